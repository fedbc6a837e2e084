/* Causal attention, forward and backward, a (batch, head) at a time. See kernels/attention.py for the mathematics.

   forward    16 queries: all their scores, softmax, times V.                       keeps out and logsumexp
   backward   64 queries: P and dS again a tile of 16 x 32 at a time, then dQ = dS K; dK += dSᵀ Q, dV += Pᵀ dO in float32
   Scores above the diagonal are computed in whole panels of 32 keys only. Legend: T tokens, K and V head sizes. */
#include "tile.h"

typedef struct { const bf16 *at; long batch, head, row; } View; /* strides in values; the last dimension is contiguous */
INLINE const bf16 *slice(const View *x, long b, long h) { return x->at + b * x->batch + h * x->head; }
INLINE void rows16(const bf16 *rows[ROWS], const bf16 *x, long stride, long first, long end) {
    for (int i = 0; i < ROWS; i++) rows[i] = first + i < end ? x + (first + i) * stride : NULL;
}
/* Keys (or values) as lanes, beyond the end zeros. */
static void pack_keys(uint32_t *panels, const bf16 *x, long stride, long T, long padded, long width) {
    for (long t = 0; t < padded; t += ROWS) {
        const bf16 *rows[ROWS];
        rows16(rows, x, stride, t, T);
        pack_lanes(panels + t / LANES * (width / 2) * LANES + t % LANES, LANES, rows, width);
    }
}
static void pack_down(uint32_t *panels, const bf16 *x, long stride, long first, long end, long padded, long width) {
    for (long p = 0; p < padded / 2; p++) {
        const long t = first + 2 * p;
        pack_pairs(panels, padded / 2, p, t < end ? x + t * stride : NULL, t + 1 < end ? x + (t + 1) * stride : NULL, width);
    }
}

typedef struct { uint32_t *keys, *values, *q, *p; float *scores, *out; bf16 *weights; } Forward;
static Forward carve_forward(Arena *s, long Tp, long K, long V) {
    Forward f;
    f.keys = take(s, Tp * K * 2);
    f.values = take(s, Tp * round_up(V, LANES) * 2);
    f.q = take(s, K / 2 * ROWS * 4);
    f.p = take(s, Tp / 2 * ROWS * 4);
    f.scores = take(s, ROWS * Tp * 4);
    f.out = take(s, ROWS * V * 4);
    f.weights = take(s, ROWS * Tp * 2);
    return f;
}

/* One row: weights = exp(scale·s - max) as bfloat16 up to key `last`, zeros up to `padded`; returns the sum and the max. */
static float softmax_row(bf16 *weights, const float *s, float scale, long last, long padded, float *max_out) {
    __m512 top = _mm512_set1_ps(-INFINITY), sum = _mm512_setzero_ps();
    const long whole = (last + 1) / 16 * 16;
    const __mmask16 tail = (1u << (last + 1 - whole)) - 1;
    for (long t = 0; t < whole; t += 16) top = _mm512_max_ps(top, _mm512_loadu_ps(s + t));
    top = _mm512_mask_max_ps(top, tail, top, _mm512_maskz_loadu_ps(tail, s + whole));
    const float max = _mm512_reduce_max_ps(top) * scale;
    const __m512 m = _mm512_set1_ps(max), c = _mm512_set1_ps(scale);
    for (long t = 0; t < padded; t += 16) {
        const __mmask16 keep = t < whole ? 0xffff : t == whole ? tail : 0;
        const __m512 e = _mm512_maskz_mov_ps(keep, exp512(_mm512_fmsub_ps(_mm512_maskz_loadu_ps(keep, s + t), c, m)));
        sum = _mm512_add_ps(sum, e);
        store_bf16(weights + t, e);
    }
    *max_out = max;
    return _mm512_reduce_add_ps(sum);
}

static void forward_head(Forward f, const bf16 *q, long qs, const bf16 *k, long ks, const bf16 *v, long vs, bf16 *out, long os,
                         float *lse, long T, long K, long V, float scale) {
    const long Tp = round_up(T, LANES);
    const bf16 *rows[ROWS];
    pack_keys(f.keys, k, ks, T, Tp, K);
    pack_down(f.values, v, vs, 0, T, Tp, V);
    for (long t = 0; t < T; t += ROWS) {
        const long keys = round_up(t + ROWS, LANES);
        rows16(rows, q, qs, t, T);
        pack_lanes(f.q, ROWS, rows, K);
        block(K / 2, f.q, ROWS, f.keys, K / 2, keys, f.scores, Tp, 0);
        float sums[ROWS];
        for (int i = 0; i < ROWS; i++) {
            float max;
            const long last = t + i < T ? t + i : T - 1;
            sums[i] = softmax_row(f.weights + i * Tp, f.scores + i * Tp, scale, last, keys, &max);
            if (t + i < T) lse[t + i] = max + logf(sums[i]);
            rows[i] = f.weights + i * Tp;
        }
        pack_lanes(f.p, ROWS, rows, keys);
        block(keys / 2, f.p, ROWS, f.values, Tp / 2, V, f.out, V, 0);
        for (int i = 0; i < ROWS && t + i < T; i++)
            for (long d = 0; d < V; d += 16)
                store_bf16(out + (t + i) * os + d, _mm512_mul_ps(_mm512_loadu_ps(f.out + i * V + d), _mm512_set1_ps(1.0f / sums[i])));
    }
}

/* out (B, T, H, V) contiguous, lse (B, H, T). */
void attention_forward(View q, View k, View v, bf16 *out, float *lse, long B, long H, long T, long K, long V, float scale,
                       int threads) {
    Arena size = {NULL, 0};
    carve_forward(&size, round_up(T, LANES), K, V);
#pragma omp parallel num_threads(threads)
    {
        Arena scratch = {allocate(size.used), 0};
        Forward f = carve_forward(&scratch, round_up(T, LANES), K, V);
#pragma omp for schedule(dynamic)
        for (long task = 0; task < B * H; task++) {
            const long b = task / H, h = task % H;
            forward_head(f, slice(&q, b, h), q.row, slice(&k, b, h), k.row, slice(&v, b, h), v.row,
                         out + (b * T * H + h) * V, H * V, lse + task * T, T, K, V, scale);
        }
        free(scratch.base);
    }
}

#define QUERIES 64 /* of a backward block */
typedef struct {
    uint32_t *keys, *values, *keys_down, *q, *d_out, *q_down, *d_out_down, *weights, *ds, *ds_rows;
    float *s, *dp, *dq, *dk, *dv;
} Backward;
static Backward carve_backward(Arena *a, long Tp, long K, long V) {
    Backward f;
    const long Kp = round_up(K, LANES), Vp = round_up(V, LANES);
    f.keys = take(a, Tp * K * 2);
    f.values = take(a, Tp * V * 2);
    f.keys_down = take(a, Tp * Kp * 2);
    f.q = take(a, K / 2 * ROWS * 4);
    f.d_out = take(a, V / 2 * ROWS * 4);
    f.q_down = take(a, QUERIES * Kp * 2);
    f.d_out_down = take(a, QUERIES * Vp * 2);
    f.weights = take(a, QUERIES / 2 * Tp * 4);
    f.ds = take(a, QUERIES / 2 * Tp * 4);
    f.ds_rows = take(a, Tp / 2 * ROWS * 4);
    f.s = take(a, ROWS * LANES * 4);
    f.dp = take(a, ROWS * LANES * 4);
    f.dq = take(a, ROWS * K * 4);
    f.dk = take(a, Tp * K * 4);
    f.dv = take(a, Tp * V * 4);
    return f;
}

/* A tile of 16 queries from t and 32 keys from `key`: P and dS as pairs of queries, and dS as pairs of keys. */
static void tile_gradients(Backward f, long t, long key, long T, long Tp, int pair0, const float *lse, const float *delta, float scale) {
    bf16 ds[ROWS][LANES] __attribute__((aligned(64)));
    const __m512 c = _mm512_set1_ps(scale);
    for (int i = 0; i < ROWS; i += 2)
        for (int j = 0; j < LANES; j += 16) {
            __m512 p[2], d[2];
            for (int r = 0; r < 2; r++) {
                const long row = t + i + r, ahead = row - (key + j); /* lanes 0 to `ahead` are allowed */
                const __mmask16 keep = row >= T || ahead < 0 ? 0 : ahead >= 15 ? 0xffff : (2u << ahead) - 1;
                const __m512 s = _mm512_loadu_ps(f.s + (i + r) * LANES + j), dp = _mm512_loadu_ps(f.dp + (i + r) * LANES + j);
                p[r] = _mm512_maskz_mov_ps(keep, exp512(_mm512_fmsub_ps(s, c, _mm512_set1_ps(lse[i + r]))));
                d[r] = _mm512_mul_ps(p[r], _mm512_mul_ps(c, _mm512_sub_ps(dp, _mm512_set1_ps(delta[i + r]))));
            }
            const __m512i pw = (__m512i)_mm512_cvtne2ps_pbh(p[1], p[0]), dw = (__m512i)_mm512_cvtne2ps_pbh(d[1], d[0]);
            const __m512i at = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5,
                                                20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
            const long to = (pair0 + i / 2) * Tp + key + j;
            _mm512_storeu_si512(f.weights + to, _mm512_permutexvar_epi16(at, pw));
            _mm512_storeu_si512(f.ds + to, _mm512_permutexvar_epi16(at, dw));
            _mm256_store_si256((__m256i *)&ds[i][j], _mm512_castsi512_si256(dw));
            _mm256_store_si256((__m256i *)&ds[i + 1][j], _mm512_extracti64x4_epi64(dw, 1));
        }
    const bf16 *rows[ROWS];
    for (int i = 0; i < ROWS; i++) rows[i] = ds[i];
    pack_lanes(f.ds_rows + key / 2 * ROWS, ROWS, rows, LANES);
}

typedef struct { const bf16 *q, *k, *v, *out, *d_out; long qs, ks, vs, os, ds; bf16 *dq, *dk, *dv; long dqs, dks, dvs; const float *lse; } Head;

static void sixteen_queries(Backward f, const Head *x, long t, int pair0, long T, long Tp, long K, long V, float scale) {
    const bf16 *rows[ROWS];
    float lse[ROWS], delta[ROWS];
    const long keys = round_up(t + ROWS, LANES) < Tp ? round_up(t + ROWS, LANES) : Tp;
    for (int i = 0; i < ROWS; i++) {
        __m512 sum = _mm512_setzero_ps();
        if (t + i < T)
            for (long d = 0; d < V; d += 16)
                sum = _mm512_fmadd_ps(load_bf16(x->out + (t + i) * x->os + d), load_bf16(x->d_out + (t + i) * x->ds + d), sum);
        delta[i] = _mm512_reduce_add_ps(sum);
        lse[i] = t + i < T ? x->lse[t + i] : 0.0f;
    }
    rows16(rows, x->q, x->qs, t, T);
    pack_lanes(f.q, ROWS, rows, K);
    rows16(rows, x->d_out, x->ds, t, T);
    pack_lanes(f.d_out, ROWS, rows, V);
    for (long key = 0; key < keys; key += LANES) {
        block(K / 2, f.q, ROWS, f.keys + key * (K / 2), K / 2, LANES, f.s, LANES, 0);
        block(V / 2, f.d_out, ROWS, f.values + key * (V / 2), V / 2, LANES, f.dp, LANES, 0);
        tile_gradients(f, t, key, T, Tp, pair0, lse, delta, scale);
    }
    block(keys / 2, f.ds_rows, ROWS, f.keys_down, Tp / 2, K, f.dq, K, 0);
    for (int i = 0; i < ROWS && t + i < T; i++)
        for (long d = 0; d < K; d += 16) store_bf16(x->dq + (t + i) * x->dqs + d, _mm512_loadu_ps(f.dq + i * K + d));
}

static void backward_head(Backward f, const Head *x, long T, long K, long V, float scale) {
    const long Tp = round_up(T, LANES);
    pack_keys(f.keys, x->k, x->ks, T, Tp, K);
    pack_keys(f.values, x->v, x->vs, T, Tp, V);
    pack_down(f.keys_down, x->k, x->ks, 0, T, Tp, K);
    memset(f.dk, 0, Tp * K * 4);
    memset(f.dv, 0, Tp * V * 4);
    for (long t = 0; t < T; t += QUERIES) {
        const long end = t + QUERIES < T ? t + QUERIES : T, keys = round_up(end, LANES);
        pack_down(f.q_down, x->q, x->qs, t, end, QUERIES, K);
        pack_down(f.d_out_down, x->d_out, x->ds, t, end, QUERIES, V);
        for (int pair = 0; pair < QUERIES / 2; pair++) { /* what the diagonal leaves out */
            const long from = t / LANES * LANES;
            memset(f.weights + pair * Tp + from, 0, (keys - from) * 4);
            memset(f.ds + pair * Tp + from, 0, (keys - from) * 4);
            if (t + 2 * pair >= end) {
                memset(f.weights + pair * Tp, 0, keys * 4);
                memset(f.ds + pair * Tp, 0, keys * 4);
            }
        }
        for (long u = t; u < end; u += ROWS) sixteen_queries(f, x, u, (u - t) / 2, T, Tp, K, V, scale);
        for (long key = 0; key < keys; key += ROWS) {
            block(QUERIES / 2, f.ds + key, Tp, f.q_down, QUERIES / 2, K, f.dk + key * K, K, 1);
            block(QUERIES / 2, f.weights + key, Tp, f.d_out_down, QUERIES / 2, V, f.dv + key * V, V, 1);
        }
    }
    for (long t = 0; t < T; t++) {
        for (long d = 0; d < K; d += 16) store_bf16(x->dk + t * x->dks + d, _mm512_loadu_ps(f.dk + t * K + d));
        for (long d = 0; d < V; d += 16) store_bf16(x->dv + t * x->dvs + d, _mm512_loadu_ps(f.dv + t * V + d));
    }
}

/* Gradients are (B, T, H, K or V) contiguous; out and lse as the forward left them. */
void attention_backward(View q, View k, View v, View d_out, const bf16 *out, const float *lse, bf16 *dq, bf16 *dk, bf16 *dv,
                        long B, long H, long T, long K, long V, float scale, int threads) {
    Arena size = {NULL, 0};
    carve_backward(&size, round_up(T, LANES), K, V);
#pragma omp parallel num_threads(threads)
    {
        Arena scratch = {allocate(size.used), 0};
        Backward f = carve_backward(&scratch, round_up(T, LANES), K, V);
#pragma omp for schedule(dynamic)
        for (long task = 0; task < B * H; task++) {
            const long b = task / H, h = task % H, at = b * T * H + h;
            const Head x = {slice(&q, b, h), slice(&k, b, h), slice(&v, b, h), out + at * V, slice(&d_out, b, h), q.row, k.row,
                            v.row, H * V, d_out.row, dq + at * K, dk + at * K, dv + at * V, H * K, H * K, H * V, lse + task * T};
            backward_head(f, &x, T, K, V, scale);
        }
        free(scratch.base);
    }
}
