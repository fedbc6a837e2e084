/* The routed experts of a layer, forward and backward. See kernels/experts.py for the mathematics and the shapes.

   Rows are token copies in expert order; row r is copy order[r] = token·K + slot. A task is one expert and at most CHUNK of its
   rows: it packs the expert's matrices into its core's cache once, and gathers the tokens while it packs them, so that no pass
   over memory only permutes. Weight gradients are a task an expert and a band of output rows.
   Legend: N tokens, D model, R = N·K rows, E experts, I expert width, G = 2·I (gate rows, then up rows). */
#include <stdatomic.h>
#include <sys/mman.h>

#include "rows.h"

#define CHUNK 256

/* Fresh memory of a hundred megabytes costs a tenth of the layer's time in page faults; huge pages make them few. Advice only. */
static void fresh(void *at, size_t bytes) {
    const uintptr_t huge = 2 << 20, from = ((uintptr_t)at + huge - 1) / huge * huge, to = ((uintptr_t)at + bytes) / huge * huge;
    if (to > from) madvise((void *)from, to - from, MADV_HUGEPAGE);
}

/* Rows that live only within a call, kept between calls: one buffer, taken by whoever comes first; another caller makes its own. */
typedef struct { size_t bytes; char pad[56]; } Buffer; /* the rows start a cache line behind it */
static _Atomic(Buffer *) spare;
static Buffer *borrow(size_t bytes) {
    Buffer *b = atomic_exchange(&spare, NULL);
    if (b && b->bytes >= bytes) return b;
    free(b);
    b = allocate(sizeof(Buffer) + bytes);
    fresh(b, sizeof(Buffer) + bytes);
    b->bytes = bytes;
    return b;
}
static void give_back(Buffer *b) { free(atomic_exchange(&spare, b)); }

typedef struct { long expert, first, end; } Task;
/* Every expert's rows in chunks; null tasks: only count. */
static long make_tasks(Task *tasks, const int64_t *offsets, long E) {
    long n = 0;
    for (long e = 0; e < E; e++)
        for (long r = offsets[e]; r < offsets[e + 1]; r += CHUNK, n++)
            if (tasks) tasks[n] = (Task){e, r, r + CHUNK < offsets[e + 1] ? r + CHUNK : offsets[e + 1]};
    return n;
}
INLINE void gather16(const bf16 *rows[ROWS], const bf16 *x, const int64_t *order, long K, long D, long first, long end) {
    for (int i = 0; i < ROWS; i++) rows[i] = first + i < end ? x + order[first + i] / K * D : NULL;
}
INLINE void follow16(const bf16 *rows[ROWS], const bf16 *x, long D, long first, long end) {
    for (int i = 0; i < ROWS; i++) rows[i] = first + i < end ? x + (first + i) * D : NULL;
}
static void pack_matrix_pairs(uint32_t *panels, const bf16 *w, long rows, long width) {
    for (long p = 0; p < rows / 2; p++) pack_pairs(panels, rows / 2, p, w + 2 * p * width, w + (2 * p + 1) * width, width);
}
/* out[t] = sum of the token's K rows, in float32, rounded once. */
static void sum_copies(bf16 *out, const bf16 *rows, const int64_t *inverse, long N, long K, long D) {
#pragma omp for schedule(static)
    for (long t = 0; t < N; t++)
        for (long d = 0; d < D; d += 16) {
            __m512 sum = _mm512_setzero_ps();
            for (long k = 0; k < K; k++) sum = _mm512_add_ps(sum, load_bf16(rows + inverse[t * K + k] * D + d));
            store_bf16(out + t * D + d, sum);
        }
}

typedef struct { uint32_t *first, *second, *a; float *c; bf16 *act; } Work;
static Work carve(Arena *s, long D, long I) {
    Work w;
    w.first = take(s, round_up(2 * I, LANES) * D * 2);
    w.second = take(s, round_up(D, LANES) * 2 * I * 2);
    w.a = take(s, (D > 2 * I ? D : 2 * I) / 2 * ROWS * 4);
    w.c = take(s, ROWS * (D > 2 * I ? D : 2 * I) * 4);
    w.act = take(s, ROWS * I * 2);
    return w;
}

static void forward_task(Work w, Task task, const bf16 *x, const bf16 *gate_up, const bf16 *down, const float *weights,
                         const int64_t *order, bf16 *h, bf16 *y, long K, long D, long I) {
    const long G = 2 * I;
    const bf16 *rows[ROWS];
    pack_rows(w.first, gate_up + task.expert * G * D, G, D, D);
    pack_rows(w.second, down + task.expert * D * I, D, I, I);
    for (long r = task.first; r < task.end; r += ROWS) {
        gather16(rows, x, order, K, D, r, task.end);
        pack_lanes(w.a, ROWS, rows, D);
        block_rows(task.end - r, D / 2, w.a, ROWS, w.first, D / 2, G, w.c, G, 0);
        for (int i = 0; i < ROWS && r + i < task.end; i++) {
            bf16 *hr = h + (r + i) * G;
            const __m512 weight = _mm512_set1_ps(weights[order[r + i]]);
            for (long j = 0; j < G; j += 16) store_bf16(hr + j, _mm512_loadu_ps(w.c + i * G + j));
            for (long j = 0; j < I; j += 16) {
                const __m512 g = load_bf16(hr + j), u = load_bf16(hr + I + j);
                store_bf16(w.act + i * I + j, _mm512_mul_ps(_mm512_mul_ps(_mm512_mul_ps(g, sigmoid(g)), u), weight));
            }
        }
        follow16(rows, w.act, I, 0, task.end - r);
        pack_lanes(w.a, ROWS, rows, I);
        block_rows(task.end - r, I / 2, w.a, ROWS, w.second, I / 2, D, w.c, D, 0);
        for (int i = 0; i < ROWS && r + i < task.end; i++)
            for (long d = 0; d < D; d += 16) store_bf16(y + (r + i) * D + d, _mm512_loadu_ps(w.c + i * D + d));
    }
}

/* out (N, D), h (R, G). */
void experts_forward(const bf16 *x, const bf16 *gate_up, const bf16 *down, const float *weights, const int64_t *order,
                     const int64_t *inverse, const int64_t *offsets, bf16 *h, bf16 *out, long N, long K, long D, long I,
                     long E, int threads) {
    Arena size = {NULL, 0};
    carve(&size, D, I);
    const long n = make_tasks(NULL, offsets, E);
    Task *tasks = allocate((n + 1) * sizeof(Task));
    make_tasks(tasks, offsets, E);
    fresh(h, N * K * 2 * I * 2);
    Buffer *buffer = borrow(N * K * D * 2);
    bf16 *y = (bf16 *)(buffer + 1);
#pragma omp parallel num_threads(threads)
    {
        Arena scratch = {allocate(size.used), 0};
        Work w = carve(&scratch, D, I);
#pragma omp for schedule(dynamic)
        for (long i = 0; i < n; i++) forward_task(w, tasks[i], x, gate_up, down, weights, order, h, y, K, D, I);
        sum_copies(out, y, inverse, N, K, D);
        free(scratch.base);
    }
    give_back(buffer);
    free(tasks);
}

/* Of the rows of a task: dh (R, G), act (R, I) with its weight, dx_rows (R, D), d_weights. */
static void backward_task(Work w, Task task, const bf16 *d_out, const bf16 *gate_up, const bf16 *down, const float *weights,
                          const int64_t *order, const bf16 *h, bf16 *dh, bf16 *act, bf16 *dx_rows, float *d_weights, long K,
                          long D, long I) {
    const long G = 2 * I;
    const __m512 one = _mm512_set1_ps(1.0f);
    const bf16 *rows[ROWS];
    pack_matrix_pairs(w.first, down + task.expert * D * I, D, I);
    pack_matrix_pairs(w.second, gate_up + task.expert * G * D, G, D);
    for (long r = task.first; r < task.end; r += ROWS) {
        gather16(rows, d_out, order, K, D, r, task.end);
        pack_lanes(w.a, ROWS, rows, D);
        block_rows(task.end - r, D / 2, w.a, ROWS, w.first, D / 2, I, w.c, I, 0);
        for (int i = 0; i < ROWS && r + i < task.end; i++) {
            const bf16 *hr = h + (r + i) * G;
            const __m512 weight = _mm512_set1_ps(weights[order[r + i]]);
            __m512 dot = _mm512_setzero_ps();
            for (long j = 0; j < I; j += 16) {
                const __m512 g = load_bf16(hr + j), u = load_bf16(hr + I + j), s = sigmoid(g), silu = _mm512_mul_ps(g, s);
                const __m512 d = _mm512_loadu_ps(w.c + i * I + j), dw = _mm512_mul_ps(d, weight), a = _mm512_mul_ps(silu, u);
                dot = _mm512_fmadd_ps(d, a, dot);
                store_bf16(act + (r + i) * I + j, _mm512_mul_ps(a, weight));
                store_bf16(dh + (r + i) * G + I + j, _mm512_mul_ps(dw, silu));
                const __m512 slope = _mm512_mul_ps(s, _mm512_fmadd_ps(g, _mm512_sub_ps(one, s), one));
                store_bf16(dh + (r + i) * G + j, _mm512_mul_ps(_mm512_mul_ps(dw, u), slope));
            }
            d_weights[order[r + i]] = _mm512_reduce_add_ps(dot);
        }
        follow16(rows, dh, G, r, task.end);
        pack_lanes(w.a, ROWS, rows, G);
        block_rows(task.end - r, I, w.a, ROWS, w.second, I, D, w.c, D, 0);
        for (int i = 0; i < ROWS && r + i < task.end; i++)
            for (long d = 0; d < D; d += 16) store_bf16(dx_rows + (r + i) * D + d, _mm512_loadu_ps(w.c + i * D + d));
    }
}

/* Output rows of a weight gradient that one task makes, so that its float32 sums stay in a core's cache. */
static long band(long height, long width) {
    long rows = 65536 / width / ROWS * ROWS;
    if (rows < ROWS) rows = ROWS;
    return rows < height ? rows : height;
}
typedef struct { uint32_t *a, *b; float *c; } Grad;
static Grad carve_grad(Arena *s, long height, long width) {
    Grad g;
    const long rows = band(height, width);
    g.a = take(s, round_up(rows, LANES) * CHUNK * 2);
    g.b = take(s, round_up(width, LANES) * CHUNK * 2);
    g.c = take(s, rows * width * 4);
    return g;
}
INLINE const bf16 *row_of(const bf16 *x, const int64_t *order, long K, long stride, long r, long end) {
    return r >= end ? NULL : x + (order ? order[r] / K : r) * stride;
}

/* dw (rows first to last of height, width) = sum over the expert's rows of left[r]ᵀ right[r]; an `order` gathers tokens. */
static void weight_gradient(Grad g, bf16 *dw, const bf16 *left, const int64_t *left_order, long height, const bf16 *right,
                            const int64_t *right_order, long width, long K, long from, long end, long first, long last) {
    const long rows = last - first;
    if (from == end) { /* an expert without a token: true zeros */
        memset(dw + first * width, 0, rows * width * 2);
        return;
    }
    for (long r = from; r < end; r += CHUNK) {
        const long stop = r + CHUNK < end ? r + CHUNK : end, pairs = (stop - r + 1) / 2;
        for (long p = 0; p < pairs; p++) {
            const bf16 *a0 = row_of(left, left_order, K, height, r + 2 * p, stop), *a1 = row_of(left, left_order, K, height, r + 2 * p + 1, stop);
            pack_pairs(g.a, pairs, p, a0 + first, a1 ? a1 + first : NULL, rows);
            pack_pairs(g.b, pairs, p, row_of(right, right_order, K, width, r + 2 * p, stop),
                       row_of(right, right_order, K, width, r + 2 * p + 1, stop), width);
        }
        for (long o = 0; o < rows; o += ROWS)
            block(pairs, g.a + o / LANES * pairs * LANES + o % LANES, LANES, g.b, pairs, width, g.c + o * width, width, r > from);
    }
    for (long i = 0; i < rows * width; i += 16) store_bf16(dw + first * width + i, _mm512_loadu_ps(g.c + i));
}

/* d_gate_up and d_down of rows dh (R, G), act (R, I): the threads of a parallel region share the tasks. */
static void weight_gradients(Arena *scratch, const bf16 *d_out, const bf16 *x, const int64_t *order, const int64_t *offsets,
                             const bf16 *dh, const bf16 *act, bf16 *d_gate_up, bf16 *d_down, long K, long D, long I, long E) {
    const long G = 2 * I, up_band = band(G, D), down_band = band(D, I);
    const long ups = (G + up_band - 1) / up_band, downs = (D + down_band - 1) / down_band;
#pragma omp for schedule(dynamic)
    for (long i = 0; i < E * (ups + downs); i++) {
        const long e = i / (ups + downs), part = i % (ups + downs);
        scratch->used = 0;
        if (part < ups) {
            const long first = part * up_band, last = first + up_band < G ? first + up_band : G;
            weight_gradient(carve_grad(scratch, G, D), d_gate_up + e * G * D, dh, NULL, G, x, order, D, K, offsets[e],
                            offsets[e + 1], first, last);
        } else {
            const long first = (part - ups) * down_band, last = first + down_band < D ? first + down_band : D;
            weight_gradient(carve_grad(scratch, D, I), d_down + e * D * I, d_out, order, D, act, NULL, I, K, offsets[e],
                            offsets[e + 1], first, last);
        }
    }
}
static size_t grad_bytes(long D, long I) {
    Arena up = {NULL, 0}, down = {NULL, 0};
    carve_grad(&up, 2 * I, D);
    carve_grad(&down, D, I);
    return up.used > down.used ? up.used : down.used;
}

/* dx (N, D), d_weights (N, K), and d_gate_up, d_down; or with `kept` (R, G + I) instead of these two the rows dh (R, G), then
   act (R, I), that experts_wgrad makes them of. */
void experts_backward(const bf16 *d_out, const bf16 *x, const bf16 *gate_up, const bf16 *down, const float *weights,
                      const int64_t *order, const int64_t *inverse, const int64_t *offsets, const bf16 *h, bf16 *dx,
                      bf16 *d_gate_up, bf16 *d_down, float *d_weights, bf16 *kept, long N, long K, long D, long I, long E,
                      int threads) {
    const long G = 2 * I, n = make_tasks(NULL, offsets, E);
    Arena size = {NULL, 0};
    carve(&size, D, I);
    const size_t most = size.used > grad_bytes(D, I) ? size.used : grad_bytes(D, I);
    Task *tasks = allocate((n + 1) * sizeof(Task));
    make_tasks(tasks, offsets, E);
    Buffer *buffer = borrow(N * K * (D + (kept ? 0 : G + I)) * 2);
    bf16 *dx_rows = (bf16 *)(buffer + 1), *dh = kept ? kept : dx_rows + N * K * D, *act = dh + N * K * G;
    if (!kept) {
        fresh(d_gate_up, E * G * D * 2);
        fresh(d_down, E * D * I * 2);
    }
#pragma omp parallel num_threads(threads)
    {
        Arena scratch = {allocate(most), 0};
        Work w = carve(&scratch, D, I);
#pragma omp for schedule(dynamic)
        for (long i = 0; i < n; i++)
            backward_task(w, tasks[i], d_out, gate_up, down, weights, order, h, dh, act, dx_rows, d_weights, K, D, I);
        sum_copies(dx, dx_rows, inverse, N, K, D);
        if (!kept) weight_gradients(&scratch, d_out, x, order, offsets, dh, act, d_gate_up, d_down, K, D, I, E);
        free(scratch.base);
    }
    give_back(buffer);
    free(tasks);
}
void experts_wgrad(const bf16 *d_out, const bf16 *x, const int64_t *order, const int64_t *offsets, const bf16 *kept,
                   bf16 *d_gate_up, bf16 *d_down, long N, long K, long D, long I, long E, int threads) {
    fresh(d_gate_up, E * 2 * I * D * 2);
    fresh(d_down, E * D * I * 2);
#pragma omp parallel num_threads(threads)
    {
        Arena scratch = {allocate(grad_bytes(D, I)), 0};
        weight_gradients(&scratch, d_out, x, order, offsets, kept, kept + N * K * 2 * I, d_gate_up, d_down, K, D, I, E);
        free(scratch.base);
    }
}
