"""The architecture: configuration, the forward, the latent cache, and the Hugging Face checkpoint in and out."""
