/* Cross entropy of a linear head with its gradients. See kernels/cross_entropy.py for the mathematics.

   A chunk of rows at a time: logits, logsumexp and softmax gradients in float32 (rounded to bfloat16 for the two products that
   follow), then bands of the weight gradient, whose float32 sums run over the chunks in order.
   Legend: N rows, D model, V vocabulary. */
#include "tile.h"

#define BAND 128 /* rows of the weight gradient that one task adds to */

static void logits_gradient(const bf16 *h, long row, long end, const int64_t *targets, const uint32_t *weight_lanes, long N, long D,
                            long V, uint32_t *a, float *logits, bf16 *grad, float *losses) {
    const bf16 *rows[ROWS];
    for (int i = 0; i < ROWS; i++) rows[i] = row + i < end ? h + (row + i) * D : NULL;
    pack_lanes(a, ROWS, rows, D);
    block(D / 2, a, ROWS, weight_lanes, D / 2, V, logits, V, 0);
    for (int i = 0; i < ROWS && row + i < end; i++) {
        float *x = logits + i * V;
        bf16 *g = grad + i * V;
        __m512 top = _mm512_loadu_ps(x), sum = _mm512_setzero_ps();
        for (long v = 16; v < V; v += 16) top = _mm512_max_ps(top, _mm512_loadu_ps(x + v));
        const float max = _mm512_reduce_max_ps(top);
        const long target = targets[row + i];
        const float chosen = x[target];
        for (long v = 0; v < V; v += 16) {
            const __m512 e = exp512(_mm512_sub_ps(_mm512_loadu_ps(x + v), _mm512_set1_ps(max)));
            _mm512_storeu_ps(x + v, e);
            sum = _mm512_add_ps(sum, e);
        }
        const float total = _mm512_reduce_add_ps(sum), share = 1.0f / (total * N);
        losses[row + i] = max + logf(total) - chosen;
        const float wanted = x[target] * share - 1.0f / N;
        for (long v = 0; v < V; v += 16) store_bf16(g + v, _mm512_mul_ps(_mm512_loadu_ps(x + v), _mm512_set1_ps(share)));
        __m512 one = _mm512_set1_ps(wanted);
        g[target] = (bf16)_mm256_extract_epi16((__m256i)_mm512_cvtneps_pbh(one), 0);
    }
}

/* losses (N), d_h (N, D) and d_weight (V, D) of the mean loss; scratch grad (chunk, V), sums (V, D) float32. */
void head_cross_entropy(const bf16 *h, const bf16 *weight, const int64_t *targets, float *losses, bf16 *d_h, bf16 *d_weight,
                        bf16 *grad, float *sums, long N, long D, long V, long chunk, int threads) {
    uint32_t *lanes = allocate(round_up(V, LANES) * D * 2), *down = allocate(round_up(D, LANES) * V * 2);
    uint32_t *h_down = allocate(round_up(D, LANES) * (chunk + 1) * 2);
#pragma omp parallel num_threads(threads)
    {
        uint32_t *a = allocate((D > V ? D : V) / 2 * ROWS * 4), *band = allocate(BAND * (chunk + 1) * 2);
        float *logits = allocate(ROWS * V * 4), *out = allocate(ROWS * D * 4);
#pragma omp for schedule(static) nowait
        for (long v = 0; v < V; v += ROWS)
            pack_rows(lanes + v / LANES * (D / 2) * LANES + v % LANES, weight + v * D, ROWS, D, D);
#pragma omp for schedule(static)
        for (long p = 0; p < V / 2; p++) pack_pairs(down, V / 2, p, weight + 2 * p * D, weight + (2 * p + 1) * D, D);
        for (long from = 0; from < N; from += chunk) {
            const long end = from + chunk < N ? from + chunk : N, pairs = (end - from + 1) / 2;
#pragma omp for schedule(static) nowait
            for (long p = 0; p < pairs; p++) {
                const long r = from + 2 * p;
                pack_pairs(h_down, pairs, p, h + r * D, r + 1 < end ? h + (r + 1) * D : NULL, D);
            }
#pragma omp for schedule(dynamic)
            for (long r = from; r < end; r += ROWS) {
                bf16 *g = grad + (r - from) * V;
                const bf16 *rows[ROWS];
                logits_gradient(h, r, end, targets, lanes, N, D, V, a, logits, g, losses);
                for (int i = 0; i < ROWS; i++) rows[i] = r + i < end ? g + i * V : NULL;
                pack_lanes(a, ROWS, rows, V);
                block(V / 2, a, ROWS, down, V / 2, D, out, D, 0);
                for (int i = 0; i < ROWS && r + i < end; i++)
                    for (long d = 0; d < D; d += 16) store_bf16(d_h + (r + i) * D + d, _mm512_loadu_ps(out + i * D + d));
            }
#pragma omp for schedule(dynamic)
            for (long v = 0; v < V; v += BAND) {
                const long rows = v + BAND < V ? BAND : V - v;
                for (long p = 0; p < pairs; p++)
                    pack_pairs(band, pairs, p, grad + 2 * p * V + v, from + 2 * p + 1 < end ? grad + (2 * p + 1) * V + v : NULL, rows);
                for (long o = 0; o < rows; o += ROWS)
                    block(pairs, band + o / LANES * pairs * LANES + o % LANES, LANES, h_down, pairs, D, sums + (v + o) * D, D, from > 0);
                if (end == N)
                    for (long i = v * D; i < (v + rows) * D; i += 16) store_bf16(d_weight + i, _mm512_loadu_ps(sums + i));
            }
        }
        free(a), free(band), free(logits), free(out);
    }
    free(lanes), free(down), free(h_down);
}
