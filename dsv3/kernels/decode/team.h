/* The threads of one step: tasks are claimed one at a time or known beforehand, and all meet between phases.

   A task's numbers do not depend on who does it. Who waits spins a little, then yields: on a machine that runs other things too,
   the thread waited for may need this one's core. */
#pragma once
#include <sched.h>
#include <stdatomic.h>

#define APART 8 /* longs in a cache line */

typedef struct {
    _Alignas(64) atomic_long next[3 * APART]; /* of this phase, the one after, and one being reset */
    _Alignas(64) atomic_int arrived;
    _Alignas(64) atomic_int generation;
    _Alignas(64) int size;
} Team;
typedef struct { Team *team; int id; long phase, own; } Worker;

static inline long claim(Worker *w) {
    return atomic_fetch_add_explicit(&w->team->next[w->phase % 3 * APART], 1, memory_order_relaxed);
}
/* The same without asking the others: every size-th task is this thread's. */
static inline long claim_own(Worker *w) {
    w->own = w->own < 0 ? w->id : w->own + w->team->size;
    return w->own;
}
static inline void meet(Worker *w) {
    Team *t = w->team;
    const int now = atomic_load_explicit(&t->generation, memory_order_relaxed);
    if (atomic_fetch_add_explicit(&t->arrived, 1, memory_order_acq_rel) == t->size - 1) {
        atomic_store_explicit(&t->next[(w->phase + 2) % 3 * APART], 0, memory_order_relaxed);
        atomic_store_explicit(&t->arrived, 0, memory_order_relaxed);
        atomic_store_explicit(&t->generation, now + 1, memory_order_release);
    } else {
        for (int spins = 0; atomic_load_explicit(&t->generation, memory_order_acquire) == now; spins++)
            if (spins > 4000) sched_yield();
#if defined __x86_64__
            else __builtin_ia32_pause();
#endif
    }
    w->phase++;
    w->own = -1;
}
