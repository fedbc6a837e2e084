/* RMS norm, forward and backward: bfloat16 in and out, all else in float32. See kernels/norm.py. Legend: N rows, D width. */
#include "rows.h"

#define PART 64 /* rows of one partial sum of the weight's gradient: the same whatever the number of threads */

/* y (N, D) and scale (N) = rsqrt(mean x² + eps), from x with rows `stride` values apart. */
void norm_forward(const bf16 *x, const float *weight, bf16 *y, float *scale, long N, long D, long stride, float eps, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long n = 0; n < N; n++) scale[n] = norm_row(x + n * stride, weight, y + n * D, D, eps);
}

/* dx (N, D), d_weight (D); parts: scratch (ceil(N / 64), D). */
void norm_backward(const bf16 *dy, const bf16 *x, const float *weight, const float *scale, bf16 *dx, float *d_weight, float *parts,
                   long N, long D, long stride, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long part = 0; part < (N + PART - 1) / PART; part++) {
        float *sums = parts + part * D;
        memset(sums, 0, D * 4);
        for (long n = part * PART; n < N && n < (part + 1) * PART; n++) {
            const bf16 *row = x + n * stride, *grad = dy + n * D;
            const __m512 s = _mm512_set1_ps(scale[n]);
            __m512 dot = _mm512_setzero_ps();
            for (long d = 0; d < D; d += 16) {
                const __m512 unit = _mm512_mul_ps(load_bf16(row + d), s), g = load_bf16(grad + d);
                _mm512_storeu_ps(sums + d, _mm512_fmadd_ps(g, unit, _mm512_loadu_ps(sums + d)));
                dot = _mm512_fmadd_ps(_mm512_mul_ps(g, _mm512_loadu_ps(weight + d)), unit, dot);
            }
            const __m512 mean = _mm512_set1_ps(_mm512_reduce_add_ps(dot) / D);
            for (long d = 0; d < D; d += 16) {
                const __m512 unit = _mm512_mul_ps(load_bf16(row + d), s), g = _mm512_mul_ps(load_bf16(grad + d), _mm512_loadu_ps(weight + d));
                store_bf16(dx + n * D + d, _mm512_mul_ps(s, _mm512_fnmadd_ps(unit, mean, g)));
            }
        }
    }
    memset(d_weight, 0, D * 4);
    for (long part = 0; part < (N + PART - 1) / PART; part++)
        for (long d = 0; d < D; d++) d_weight[d] += parts[part * D + d];
}
