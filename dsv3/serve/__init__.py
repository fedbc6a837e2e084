"""HTTP: the APIs of DeepSeek and OpenAI, and the chat page."""
