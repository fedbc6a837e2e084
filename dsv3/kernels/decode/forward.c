/* A step: N tokens of some sequences through the decoder layers, their latents into the pages, final states out.

   Phases of a layer, between which the threads meet:
     1  norm, q_a and kv_a          4  o_proj, added to the stream        6  chosen experts' gate and up
     2  norm, q_b; latents stored   5  norm, router; gate and up of the   7  their down, and the other's, added
     3  attention                      shared experts or the dense MLP
   A task is a strip of outputs for all rows, or a few rows; each element is one task's. With one or two rows the norms are
   made by every thread for itself, which costs less than meeting.
   Legend: model.h. Rows are those of the step; a copy is one of a row's K, sorted by expert. */
#include <omp.h>

#include "attention.h"
#include "product.h"
#include "team.h"

#define FEW 2   /* rows whose norms every thread makes for itself */
#define SOME 16 /* rows whose work the threads share evenly, each knowing its part */

typedef struct { long sequence, row, rows; } Block; /* rows of one sequence that attend together */
typedef struct {
    const Model *m;
    Store store;
    long rows, blocks, most_rows; /* most_rows: of a block */
    const int64_t *sequences, *tokens; /* (S, 3): first position, rows, where its pages begin */
    const int64_t *pages;
    int64_t *positions, *chosen, *counts; /* (N,), (MoE layers, N, K), (MoE layers, E) or NULL */
    Block *block;
    float *x, *normed, *compressed, *latent, *q, *heads, *shared, *act, *cos, *sin, *weights;
    float *streams; /* (layers run, N, D): the stream behind each layer is told, or NULL */
} Step;
typedef struct { /* a thread's own */
    Worker worker;
    float *few, *panel;
    AttentionWork attention;
    int32_t *copies, *offsets; /* (N·K,) copies by expert, (E + 1,) where each begins */
    long used, *experts;       /* those that have any */
} Self;

static long widest(const Model *m) { return most(most(2 * m->dim, m->q_rank), most(m->mlp_width, m->expert_width)); }

/* -- memory -------------------------------------------------------------------------------------------------------------- */

typedef struct { char *base; long used; } Arena;
static void *take(Arena *a, long bytes) {
    void *at = a->base ? a->base + a->used : NULL;
    a->used += round_up(bytes, 64) + 64;
    return at;
}
static void carve(Arena *a, Step *s, const Model *m, long N) {
    const long K = most(m->top_k, 1);
    s->positions = take(a, N * 8);
    s->block = take(a, N * sizeof(Block));
    s->x = take(a, N * m->dim * 4);
    s->normed = take(a, N * widest(m) * 4);
    s->compressed = take(a, N * most(m->q_rank, 1) * 4);
    s->latent = take(a, N * (m->rank + m->rope) * 4);
    s->q = take(a, N * m->heads * (m->nope + m->rope) * 4);
    s->heads = take(a, N * m->heads * m->value * 4);
    s->shared = take(a, N * most(m->mlp_width, 1) * 4);
    s->act = take(a, N * K * most(m->expert_width, 1) * 4);
    s->cos = take(a, N * m->rope / 2 * 4);
    s->sin = take(a, N * m->rope / 2 * 4);
    s->weights = take(a, N * K * 4);
    s->chosen = take(a, N * K * 8);
}
static void carve_self(Arena *a, Self *self, const Model *m, long N) {
    const long K = most(m->top_k, 1);
    self->few = take(a, FEW * widest(m) * 4);
    self->panel = take(a, 2 * STRIP * (widest(m) + LANES) * 4);
    float *attention = take(a, attention_floats(m) * 4);
    if (a->base) self->attention = carve_attention(m, attention);
    self->copies = take(a, N * K * 4);
    self->offsets = take(a, (m->experts + 1) * 4);
    self->experts = take(a, m->experts * 8);
}
/* Bytes that a step of so many rows works in. */
long decode_bytes(const Model *m, long rows, int threads) {
    Arena a = {NULL, 0};
    Step s;
    Self self;
    carve(&a, &s, m, rows);
    for (int i = 0; i < threads; i++) carve_self(&a, &self, m, rows);
    return a.used;
}

/* The next of a phase's units for this thread, [*from, result). Some rows: one even share each, without asking the others, for a
   word that goes from core to core costs more than what it might balance; and what a share reads it reads in one run, whose next
   strip is fetched ahead into the core that will want it. Many rows: one unit at a time, whoever is free. */
static long next(Self *self, long rows) { return rows > SOME ? claim(&self->worker) : claim_own(&self->worker); }
static long claim_run(Self *self, long rows, long units, long *from) {
    const long size = self->worker.team->size, each = rows > SOME ? 1 : (units + size - 1) / size;
    *from = next(self, rows) * each;
    return least(*from + each, units);
}
#define EACH(i, units) \
    for (long i, end_; end_ = claim_run(self, s->rows, units, &i), i < (units);) \
        for (; i < end_; i++)

/* -- phases -------------------------------------------------------------------------------------------------------------- */

/* What every thread needs of norm(x): its own copy of a few rows, or all threads' together. */
static const float *normalise(const Step *s, Self *self, const float *x, Vector w, long width) {
    const float eps = s->m->eps;
    if (s->rows <= FEW) {
        for (long r = 0; r < s->rows; r++) rms_norm(x + r * width, w, width, eps, self->few + r * width);
        return self->few;
    }
    for (long i; (i = claim(&self->worker) * 8) < s->rows;)
        for (long r = i; r < least(i + 8, s->rows); r++) rms_norm(x + r * width, w, width, eps, s->normed + r * width);
    meet(&self->worker);
    return s->normed;
}

/* One strip of y (N, rows of m) = x (N, width of m) times m; `add`: to what y holds. */
static void linear_strip(const Matrix *m, long first, long N, const float *x, float *panel, float *y, int add) {
    const long n = least(STRIP, m->rows - first);
    long at = first;
    const Matrix near = for_rows(m, &at, N, panel);
    for (long r = 0; r < N; r += 4) {
        const long R = least(4, N - r);
        const float *rows[4];
        float out[4][STRIP];
        for (long i = 0; i < R; i++) rows[i] = x + (r + i) * m->width;
        strip(&near, at, R, rows, out);
        for (long i = 0; i < R; i++) {
            float *to = y + (r + i) * m->rows + first;
            if (add) for (long j = 0; j < n; j++) to[j] += out[i][j];
            else memcpy(to, out[i], n * 4);
        }
    }
}
static long strips(const Matrix *m) { return m->at ? (m->rows + STRIP - 1) / STRIP : 0; }
static void linear(const Step *s, Self *self, const Matrix *m, const float *x, float *y, int add) {
    EACH (i, strips(m)) linear_strip(m, i * STRIP, s->rows, x, self->panel, y, add);
    meet(&self->worker);
}

/* silu(gate)·up of one strip, for rows x[row_of(copy)]: into act rows, times the copy's weight if there are weights. */
static void gate_up_strip(const Mlp *mlp, long first, long n, const float *x, const int32_t *copies, long K, const float *weights,
                          float *panel, float *act) {
    const long I = mlp->gate.rows, D = mlp->gate.width, width = least(STRIP, I - first);
    long at = first, also = first;
    const Matrix gate = for_rows(&mlp->gate, &at, n, panel), up = for_rows(&mlp->up, &also, n, panel + STRIP * (D + LANES));
    for (long r = 0; r < n; r += 4) {
        const long R = least(4, n - r);
        const float *rows[4];
        float g[4][STRIP], u[4][STRIP];
        for (long i = 0; i < R; i++) rows[i] = x + (copies ? copies[r + i] / K : r + i) * D;
        strip(&gate, at, R, rows, g);
        strip(&up, also, R, rows, u);
        for (long i = 0; i < R; i++) {
            const float weight = weights ? weights[copies[r + i]] : 1.0f;
            for (long j = 0; j < STRIP; j += LANES) store(g[i] + j, silu(load(g[i] + j)) * load(u[i] + j) * weight);
            memcpy(act + (r + i) * I + first, g[i], width * 4);
        }
    }
}
/* x[row_of(copy)] += act times down, one strip. */
static void down_strip(const Matrix *m, long first, long n, const float *act, const int32_t *copies, long K, float *panel, float *x) {
    const long width = least(STRIP, m->rows - first);
    long at = first;
    const Matrix near = for_rows(m, &at, n, panel);
    for (long r = 0; r < n; r += 4) {
        const long R = least(4, n - r);
        const float *rows[4];
        float out[4][STRIP];
        for (long i = 0; i < R; i++) rows[i] = act + (r + i) * m->width;
        strip(&near, at, R, rows, out);
        for (long i = 0; i < R; i++) {
            float *to = x + (copies ? copies[r + i] / K : r + i) * m->rows + first;
            for (long j = 0; j < width; j++) to[j] += out[i][j];
        }
    }
}

/* The row's latent to its place: c_kv normalised, k_pe turned. */
static void store_latent(const Step *s, const Layer *layer, char *latents, long sequence, long r) {
    const Model *m = s->m;
    const long C = m->rank, R = m->rope;
    float row[C + R];
    const float *latent = s->latent + r * (C + R), *pe = latent + C, *c = s->cos + r * R / 2, *sn = s->sin + r * R / 2;
    rms_norm(latent, layer->kv_norm, C, m->eps, row);
    for (long i = 0; i < R / 2; i++) {
        row[C + 2 * i] = pe[2 * i] * c[i] - pe[2 * i + 1] * sn[i];
        row[C + 2 * i + 1] = pe[2 * i] * sn[i] + pe[2 * i + 1] * c[i];
    }
    const int64_t *pages = s->pages + s->sequences[sequence * 3 + 2];
    const long slot = pages[s->positions[r] / PAGE] * PAGE + s->positions[r] % PAGE;
    if (s->store.kind == FLOAT32) memcpy(latents + slot * (C + R) * 4, row, (C + R) * 4);
    else
        for (long i = 0; i < C + R; i++) ((uint16_t *)latents)[slot * (C + R) + i] = to_bf16(row[i]);
}

static void attention(const Step *s, Self *self, const Layer *layer, const char *latents, long first_key) {
    const Model *m = s->m;
    long heads = least(m->heads, QUERIES / s->most_rows);
    while (heads > 1 && s->blocks * ((m->heads + heads - 1) / heads) < self->worker.team->size) heads = (heads + 1) / 2;
    const long groups = (m->heads + heads - 1) / heads;
    for (long i; (i = next(self, s->rows)) < s->blocks * groups;) {
        const Block *b = s->block + i / groups;
        const long head = i % groups * heads, r = b->row;
        attend(m, layer, &self->attention, latents, (int)s->store.kind, s->pages + s->sequences[b->sequence * 3 + 2], first_key,
               s->positions[r], b->rows, head, least(heads, m->heads - head), s->q + r * m->heads * (m->nope + m->rope),
               s->cos + r * m->rope / 2, s->sin + r * m->rope / 2, s->heads + r * m->heads * m->value);
    }
    meet(&self->worker);
}

/* The best of `n` by value, the first of equals; it is then out of the game. Something is chosen even among no numbers. */
static long take_best(float *value, char *gone, long n) {
    long best = -1;
    for (long i = 0; i < n; i++)
        if (!gone[i] && (best < 0 || value[i] > value[best])) best = i;
    gone[best] = 1;
    return best;
}
/* As dsv3.kernels.moe.route: chosen by score + bias within the best groups, weighted by score. */
static void route(const Model *m, const Layer *layer, const float *x, int64_t *chosen, float *weights) {
    const long E = m->experts, G = m->groups, each = E / G;
    float score[E + STRIP], value[E], group[G], total = 0;
    char gone[E], group_gone[G];
    for (long e = 0; e < E; e += STRIP) {
        float y[4][STRIP];
        const float *rows[4] = {x};
        strip(&layer->router, e, 1, rows, y);
        memcpy(score + e, y[0], sizeof y[0]);
    }
    for (long e = 0; e < E; e++) {
        score[e] = 1.0f / (1.0f + expf(-score[e]));
        value[e] = score[e] + layer->bias[e];
    }
    memset(gone, 0, E);
    if (m->top_groups < G) {
        memset(group_gone, 0, G);
        memset(gone, 1, E);
        for (long g = 0; g < G; g++) {
            float first = -INFINITY, second = -INFINITY;
            for (long e = g * each; e < (g + 1) * each; e++) {
                if (value[e] > first) second = first, first = value[e];
                else if (value[e] > second) second = value[e];
            }
            group[g] = first + second;
        }
        for (long i = 0; i < m->top_groups; i++) memset(gone + take_best(group, group_gone, G) * each, 0, each);
    }
    for (long k = 0; k < m->top_k; k++) {
        chosen[k] = take_best(value, gone, E);
        weights[k] = score[chosen[k]];
        total += weights[k];
    }
    for (long k = 0; k < m->top_k; k++)
        weights[k] = (m->normalise ? weights[k] / (total + 1e-20f) : weights[k]) * m->routed_scale;
}
/* Copies by expert, a row's order kept: every thread for itself. */
static void sort_copies(const Step *s, Self *self, const int64_t *chosen) {
    const long E = s->m->experts, n = s->rows * s->m->top_k;
    int32_t *at = self->offsets;
    memset(at, 0, (E + 1) * 4);
    for (long i = 0; i < n; i++) at[chosen[i] + 1]++;
    self->used = 0;
    for (long e = 0; e < E; e++) {
        if (at[e + 1]) self->experts[self->used++] = e;
        at[e + 1] += at[e];
    }
    for (long i = 0; i < n; i++) self->copies[at[chosen[i]]++] = (int32_t)i;
    for (long e = E; e > 0; e--) at[e] = at[e - 1];
    at[0] = 0;
}

static void feed_forward(const Step *s, Self *self, const Layer *layer, long moe) {
    const Model *m = s->m;
    const long N = s->rows, K = m->top_k, routes = layer->router.at ? (N + 3) / 4 : 0;
    int64_t *chosen = s->chosen + moe * N * K;
    const float *x = normalise(s, self, s->x, layer->post_norm, m->dim);
    for (long i; (i = next(self, N)) < routes + strips(&layer->mlp.gate);) {
        if (i >= routes) gate_up_strip(&layer->mlp, (i - routes) * STRIP, N, x, NULL, 1, NULL, self->panel, s->shared);
        else for (long r = i * 4; r < least(N, i * 4 + 4); r++) route(m, layer, x + r * m->dim, chosen + r * K, s->weights + r * K);
    }
    meet(&self->worker);
    const long per = strips(&layer->experts.gate);
    self->used = 0;
    if (routes) {
        sort_copies(s, self, chosen);
        EACH (i, self->used * per) {
            const long e = self->experts[i / per], from = self->offsets[e];
            const Mlp one = {of_expert(&layer->experts.gate, e), of_expert(&layer->experts.up, e), layer->experts.down};
            gate_up_strip(&one, i % per * STRIP, self->offsets[e + 1] - from, x, self->copies + from, K, s->weights, self->panel,
                          s->act + from * one.gate.rows);
        }
        if (self->worker.id == 0 && s->counts)
            for (long e = 0; e < m->experts; e++) s->counts[moe * m->experts + e] += self->offsets[e + 1] - self->offsets[e];
        meet(&self->worker);
    }
    const long all = (m->dim + STRIP - 1) / STRIP;
    for (long i, end; end = claim_run(self, N, all, &i), i < all;) {
        if (layer->mlp.down.at)
            for (long j = i; j < end; j++) down_strip(&layer->mlp.down, j * STRIP, N, s->shared, NULL, 1, self->panel, s->x);
        for (long u = 0; u < self->used; u++) {
            const long e = self->experts[u], from = self->offsets[e];
            const Matrix down = of_expert(&layer->experts.down, e);
            for (long j = i; j < end; j++)
                down_strip(&down, j * STRIP, self->offsets[e + 1] - from, s->act + from * down.width, self->copies + from, K,
                           self->panel, s->x);
        }
    }
    meet(&self->worker);
}

static void decoder_layer(const Step *s, Self *self, const Layer *layer, long slot, long first_key, long moe) {
    const Model *m = s->m;
    char *latents = s->store.latents + slot * s->store.pages * PAGE * (m->rank + m->rope) * size_of((int)s->store.kind);
    const float *x = normalise(s, self, s->x, layer->input_norm, m->dim);
    const Matrix *first = layer->q_a.at ? &layer->q_a : &layer->q;
    float *queries = layer->q_a.at ? s->compressed : s->q;
    EACH (i, strips(first) + strips(&layer->kv_a)) {
        if (i < strips(first)) linear_strip(first, i * STRIP, s->rows, x, self->panel, queries, 0);
        else linear_strip(&layer->kv_a, (i - strips(first)) * STRIP, s->rows, x, self->panel, s->latent, 0);
    }
    meet(&self->worker);
    const long products = layer->q_a.at ? strips(&layer->q) : 0;
    if (products) x = normalise(s, self, s->compressed, layer->q_norm, layer->q_a.rows);
    EACH (i, products + s->blocks) {
        if (i < products) linear_strip(&layer->q, i * STRIP, s->rows, x, self->panel, s->q, 0);
        else {
            const Block *b = s->block + i - products;
            for (long r = b->row; r < b->row + b->rows; r++) store_latent(s, layer, latents, b->sequence, r);
        }
    }
    meet(&self->worker);
    attention(s, self, layer, latents, first_key);
    linear(s, self, &layer->o, s->heads, s->x, 1);
    feed_forward(s, self, layer, moe);
}

/* Row r's token as the stream begins, and its turns. previous: the states that MTP layers mix in, or NULL. */
static void begin_row(const Step *s, const Layer *mtp, const float *previous, long r) {
    const Model *m = s->m;
    const long D = m->dim;
    float row[round_up(D, LANES)];
    widen_row(&m->embedding, s->tokens[r], row);
    if (previous) {
        rms_norm(row, mtp->e_norm, D, m->eps, s->normed + 2 * r * D);
        rms_norm(previous + r * D, mtp->h_norm, D, m->eps, s->normed + (2 * r + 1) * D);
    } else memcpy(s->x + r * D, row, D * 4);
    for (long i = 0; i < m->rope / 2; i++) {
        const float angle = (float)s->positions[r] * m->frequencies[i];
        s->cos[r * m->rope / 2 + i] = cosf(angle) * m->rope_scale;
        s->sin[r * m->rope / 2 + i] = sinf(angle) * m->rope_scale;
    }
}
static void whole_step(const Step *s, Self *self, long mtp, const float *previous, float *states) {
    const Model *m = s->m;
    const long D = m->dim, first = mtp < 0 ? 0 : m->main_layers + mtp, end = mtp < 0 ? m->main_layers : first + 1;
    const Vector norm = mtp < 0 ? m->norm : m->layers[first].head_norm;
    for (long r; (r = claim(&self->worker)) < s->rows;) begin_row(s, m->layers + first, previous, r);
    meet(&self->worker);
    if (previous) linear(s, self, &m->layers[first].eh, s->normed, s->x, 0);
    for (long i = first, moe = 0; i < end; i++) {
        decoder_layer(s, self, m->layers + i, i, mtp >= 0, moe);
        moe += m->layers[i].router.at != NULL;
        if (!s->streams) continue;
        for (long r; (r = claim(&self->worker)) < s->rows;)
            memcpy(s->streams + ((i - first) * s->rows + r) * D, s->x + r * D, D * 4);
        meet(&self->worker);
    }
    for (long r; (r = claim(&self->worker)) < s->rows;) {
        float *out = states + r * D;
        rms_norm(s->x + r * D, norm, D, m->eps, out);
        if (s->store.kind == BFLOAT16) for (long d = 0; d < D; d++) out[d] = from_bf16(to_bf16(out[d]));
    }
}

/* -- what Python calls --------------------------------------------------------------------------------------------------- */

static void plan_rows(Step *s, long sequences) {
    const long each = 8;
    long row = 0;
    s->blocks = 0, s->most_rows = 1;
    for (long q = 0; q < sequences; q++)
        for (long i = 0, n = s->sequences[q * 3 + 1]; i < n; i++, row++) {
            s->positions[row] = s->sequences[q * 3] + i;
            if (i % each) continue;
            s->block[s->blocks++] = (Block){q, row, least(each, n - i)};
            s->most_rows = most(s->most_rows, least(each, n - i));
        }
}
/* states (N, D) of a step. plan: (S, 3), then the tokens, then all sequences' pages. mtp: -1 for the main layers, or which MTP
   layer reads `previous` (N, D). chosen (MoE layers, N, K) and counts (MoE layers, E), added to, may be NULL with mtp >= 0;
   streams (layers run, N, D) always. */
void decode_step(const Model *m, const Store *store, const int64_t *plan, long sequences, long rows, long mtp,
                 const float *previous, float *states, int64_t *chosen, int64_t *counts, float *streams, char *memory,
                 int threads) {
    Arena arena = {(char *)round_up((long)memory, 64), 0};
    Step s = {.m = m, .store = *store, .rows = rows, .streams = streams};
    carve(&arena, &s, m, rows);
    s.sequences = plan, s.tokens = plan + 3 * sequences, s.pages = s.tokens + rows, s.counts = counts;
    if (chosen) s.chosen = chosen;
    plan_rows(&s, sequences);
    Self selves[threads];
    memset(selves, 0, sizeof selves);
    for (int i = 0; i < threads; i++) carve_self(&arena, selves + i, m, rows);
    Team team;
    memset(&team, 0, sizeof team);
    team.size = threads;
#pragma omp parallel num_threads(threads)
    {
        const int id = omp_get_thread_num();
#pragma omp single
        team.size = omp_get_num_threads();
        Self *self = selves + id;
        self->worker = (Worker){&team, id, 0, -1};
        whole_step(&s, self, mtp, previous, states);
    }
}
/* logits (n, V) of states (n, D). */
void decode_logits(const Model *m, const float *states, long rows, float *logits, char *memory, int threads) {
    const long each = (strips(&m->head) + threads * 8 - 1) / (threads * 8), panel = STRIP * (m->dim + LANES);
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (long i = 0; i < strips(&m->head); i += each)
        for (long j = i; j < least(i + each, strips(&m->head)); j++)
            linear_strip(&m->head, j * STRIP, rows, states, (float *)memory + omp_get_thread_num() * panel, logits, 0);
}
