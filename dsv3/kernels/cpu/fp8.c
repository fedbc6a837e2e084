/* FP8 on a CPU that has none: casts to e4m3 with their scales, and products that add as the recipe does. See kernels/quant.py
   and kernels/gemm.py for the mathematics; spec 6.

   A code of e4m3 (or e5m2) is exact in bfloat16, so a product of codes runs on the bfloat16 tile and loses nothing; the sum of
   every 128 along K is then multiplied by both scales and added in float32. Codes become pairs only in a core's cache: no
   matrix is ever expanded.
   Legend: R rows, K contraction, N columns of the result, E experts, T tiles. */
#include "rows.h"

#define SIDE 128 /* of a tile: values that share a scale */
#define BAND 256 /* rows, and columns, of the result that one task makes: 256 KiB of float32 */
#define DEPTH 512 /* of the contraction, packed at once */

typedef uint8_t fp8;

/* ---- codes ------------------------------------------------------------------------------------------------------------ */

/* Rounds to nearest even, saturates at 448; a NaN gives 0x7f. Input is already divided by its scale. */
INLINE __m128i to_e4m3(__m512 x) {
    const __m512i bits = _mm512_castps_si512(x), sign = _mm512_and_si512(_mm512_srli_epi32(bits, 24), _mm512_set1_epi32(0x80));
    const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    const __m512 size = _mm512_min_ps(_mm512_abs_ps(x), _mm512_set1_ps(448.0f));
    const __m512i u = _mm512_castps_si512(size), odd = _mm512_and_si512(_mm512_srli_epi32(u, 20), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(u, _mm512_set1_epi32(0x7ffff)), odd);
    const __m512i normal = _mm512_sub_epi32(_mm512_srli_epi32(rounded, 20), _mm512_set1_epi32(120 << 3));
    /* Below 2^-6 the step is 2^-9: adding 2^14 makes float32's own rounding stop there. */
    const __m512 magic = _mm512_set1_ps(16384.0f);
    const __m512i small = _mm512_sub_epi32(_mm512_castps_si512(_mm512_add_ps(size, magic)), _mm512_castps_si512(magic));
    const __mmask16 tiny = _mm512_cmp_ps_mask(size, _mm512_set1_ps(0.015625f), _CMP_LT_OQ);
    __m512i code = _mm512_or_si512(_mm512_mask_blend_epi32(tiny, normal, small), sign);
    return _mm512_cvtepi32_epi8(_mm512_mask_blend_epi32(nan, code, _mm512_set1_epi32(0x7f)));
}

/* The bfloat16 of codes 0 to 127 of a format, in registers. */
typedef struct { __m512i part[4]; } Table;
static void fill(uint16_t values[128], int mantissa, int bias) {
    for (int c = 0; c < 128; c++) {
        const int e = c >> mantissa, m = c & ((1 << mantissa) - 1);
        const float v = e ? ldexpf((float)((1 << mantissa) + m), e - bias - mantissa) : ldexpf((float)m, 1 - bias - mantissa);
        uint32_t bits;
        memcpy(&bits, &v, 4);
        values[c] = bits >> 16;
    }
}
static Table table_of(long e5m2) {
    uint16_t v[128];
    Table t;
    fill(v, e5m2 ? 2 : 3, e5m2 ? 15 : 7);
    if (e5m2) v[124] = 0x7f80, v[125] = v[126] = v[127] = 0x7fc0;
    else v[127] = 0x7fc0;
    for (int i = 0; i < 4; i++) t.part[i] = _mm512_loadu_si512(v + 32 * i);
    return t;
}
INLINE __m512i decode32(const Table *t, __m256i codes) {
    const __m512i c = _mm512_cvtepu8_epi16(codes);
    const __m512i low = _mm512_permutex2var_epi16(t->part[0], c, t->part[1]), high = _mm512_permutex2var_epi16(t->part[2], c, t->part[3]);
    const __mmask32 upper = _mm512_test_epi16_mask(c, _mm512_set1_epi16(0x40)), minus = _mm512_test_epi16_mask(c, _mm512_set1_epi16(0x80));
    const __m512i v = _mm512_mask_blend_epi16(upper, low, high);
    return _mm512_mask_or_epi32(v, 0xffff, v, _mm512_maskz_mov_epi16(minus, _mm512_set1_epi16((short)0x8000)));
}
/* n codes become bfloat16, zeros behind them up to `padded`, a multiple of 32. */
static void decode(const Table *t, bf16 *out, const fp8 *codes, long n, long padded) {
    for (long i = 0; i < padded; i += 32) {
        const __mmask32 keep = n - i >= 32 ? 0xffffffff : n > i ? (1u << (n - i)) - 1 : 0;
        _mm512_storeu_si512(out + i, decode32(t, _mm256_maskz_loadu_epi8(keep, codes + i)));
    }
}

/* ---- casts ------------------------------------------------------------------------------------------------------------ */

/* amax / 448, next power of two if asked; not a number if amax is not finite: then nothing of the tile survives. */
INLINE float scale_of(float amax, int pow2) {
    if (!(amax <= 3.4028234e38f)) return NAN;
    const float least = 448.0f * 1.17549435e-38f, s = (amax < least ? least : amax) / 448.0f;
    if (!pow2) return s;
    uint32_t bits;
    memcpy(&bits, &s, 4);
    bits = (bits + 0x7fffff) & 0xff800000;
    float up;
    memcpy(&up, &bits, 4);
    return up;
}
INLINE __m512 load16(const void *x, long i, int wide) {
    return wide ? _mm512_loadu_ps((const float *)x + i) : load_bf16((const bf16 *)x + i);
}
/* The order of max's operands keeps a NaN once it is there, and takes a new one in by the test. */
INLINE __m512 larger(__m512 top, __m512 x) {
    const __m512 a = _mm512_abs_ps(x);
    return _mm512_mask_mov_ps(_mm512_max_ps(a, top), _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q), a);
}
INLINE float reduce_amax(__m512 top) {
    return _mm512_cmp_ps_mask(top, top, _CMP_UNORD_Q) ? NAN : _mm512_reduce_max_ps(top);
}
INLINE __m128i code16(__m512 x, __m512 scale) { return to_e4m3(_mm512_div_ps(x, scale)); }

/* x (R, K), bfloat16 or float32 -> q (R, K), s (R, ceil K/128). K: a multiple of 16. */
void cast_tiles(const void *x, fp8 *q, float *s, long R, long K, long wide, long pow2, int threads) {
    const long tiles = (K + SIDE - 1) / SIDE;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long r = 0; r < R; r++)
        for (long t = 0; t < tiles; t++) {
            const long from = r * K + t * SIDE, end = from + (K - t * SIDE < SIDE ? K - t * SIDE : SIDE);
            __m512 top = _mm512_setzero_ps();
            for (long i = from; i < end; i += 16) top = larger(top, load16(x, i, wide));
            const float scale = scale_of(reduce_amax(top), pow2);
            s[r * tiles + t] = scale;
            for (long i = from; i < end; i += 16) _mm_storeu_si128((__m128i *)(q + i), code16(load16(x, i, wide), _mm512_set1_ps(scale)));
        }
}

/* One row of bfloat16 that was just made: its tiles. */
INLINE void cast_row(const bf16 *y, fp8 *q, float *s, long K) {
    for (long t = 0; t * SIDE < K; t++) {
        const long end = K - t * SIDE < SIDE ? K : (t + 1) * SIDE;
        __m512 top = _mm512_setzero_ps();
        for (long i = t * SIDE; i < end; i += 16) top = larger(top, load_bf16(y + i));
        const float scale = s[t] = scale_of(reduce_amax(top), 0);
        for (long i = t * SIDE; i < end; i += 16) _mm_storeu_si128((__m128i *)(q + i), code16(load_bf16(y + i), _mm512_set1_ps(scale)));
    }
}

/* SwiGLU of cpu/swiglu.c, y (R, I), and its tiles q (R, I), s (R, ceil I/128). */
void swiglu_cast(const bf16 *gate, const bf16 *up, const float *weights, bf16 *y, fp8 *q, float *s, long R, long I, long gate_row,
                 long up_row, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long r = 0; r < R; r++) {
        swiglu_row(gate + r * gate_row, up + r * up_row, weights ? weights[r] : 1.0f, y + r * I, I);
        cast_row(y + r * I, q + r * I, s + r * ((I + SIDE - 1) / SIDE), I);
    }
}

/* RMS norm of cpu/norm.c, y (N, D) and factors (N), and its tiles q (N, D), s (N, ceil D/128). */
void norm_cast(const bf16 *x, const float *weight, bf16 *y, float *factors, fp8 *q, float *s, long N, long D, long stride, float eps,
               int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long n = 0; n < N; n++) {
        factors[n] = norm_row(x + n * stride, weight, y + n * D, D, eps);
        cast_row(y + n * D, q + n * D, s + n * ((D + SIDE - 1) / SIDE), D);
    }
}

/* Tiles of 128 rows by 1 column, counted from each expert's first row: x (R, K) -> q (K, R), s (K, T), T = R / 128 + E.
   Input values, or the codes and scales of 1x128 tiles (then x is q, and scales their scales). K: a multiple of 16. */
void cast_columns(const void *x, const float *scales, const int64_t *offsets, fp8 *q, float *s, long R, long K, long E, long wide,
                  long pow2, int threads) {
    const long T = R / SIDE + E, across = (K + SIDE - 1) / SIDE;
    memset(s, 0, K * T * 4);
#pragma omp parallel num_threads(threads)
    {
        const Table table = table_of(0);
        float *v = allocate(SIDE * SIDE * 4);
        fp8 *codes = allocate(SIDE * SIDE);
        for (long e = 0; e < E; e++) {
            const long first = offsets[e] / SIDE + e, tiles = (offsets[e + 1] - offsets[e] + SIDE - 1) / SIDE;
#pragma omp for schedule(static) nowait
            for (long i = 0; i < tiles * across; i++) {
                const long t = i / across, k0 = i % across * SIDE, width = K - k0 < SIDE ? K - k0 : SIDE;
                const long r0 = offsets[e] + t * SIDE, rows = offsets[e + 1] - r0 < SIDE ? offsets[e + 1] - r0 : SIDE;
                __m512 top[SIDE / 16];
                for (long j = 0; j < width / 16; j++) top[j] = _mm512_setzero_ps();
                for (long r = 0; r < rows; r++)
                    for (long j = 0; j < width / 16; j++) {
                        const long at = (r0 + r) * K + k0 + 16 * j;
                        __m512 y;
                        if (scales) {
                            const __m256i c = _mm256_castsi128_si256(_mm_loadu_si128((const __m128i *)((const fp8 *)x + at)));
                            y = _mm512_mul_ps(widen(_mm512_castsi512_si256(decode32(&table, c))), _mm512_set1_ps(scales[(r0 + r) * across + k0 / SIDE]));
                        } else y = load16(x, at, wide);
                        _mm512_storeu_ps(v + r * SIDE + 16 * j, y);
                        top[j] = larger(top[j], y);
                    }
                for (long j = 0; j < width / 16; j++) {
                    float scale[16];
                    _mm512_storeu_ps(scale, top[j]);
                    for (int l = 0; l < 16; l++) s[(k0 + 16 * j + l) * T + first + t] = scale[l] = scale_of(scale[l], pow2);
                    for (long r = 0; r < rows; r++)
                        _mm_storeu_si128((__m128i *)(codes + r * SIDE + 16 * j), code16(_mm512_loadu_ps(v + r * SIDE + 16 * j), _mm512_loadu_ps(scale)));
                }
                for (long k = 0; k < width; k++)
                    for (long r = 0; r < rows; r++) q[(k0 + k) * R + r0 + r] = codes[r * SIDE + k];
            }
        }
        free(v), free(codes);
    }
}

/* w (E, O, I) -> q (E, O, I), s (E, ceil O/128, ceil I/128). I: a multiple of 16. */
void cast_blocks(const void *w, fp8 *q, float *s, long E, long O, long I, long wide, int threads) {
    const long down = (O + SIDE - 1) / SIDE, across = (I + SIDE - 1) / SIDE;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long i = 0; i < E * down * across; i++) {
        const long e = i / (down * across), o0 = i / across % down * SIDE, i0 = i % across * SIDE;
        const long rows = O - o0 < SIDE ? O - o0 : SIDE, width = I - i0 < SIDE ? I - i0 : SIDE;
        __m512 top = _mm512_setzero_ps();
        for (long r = 0; r < rows; r++)
            for (long j = 0; j < width; j += 16) top = larger(top, load16(w, (e * O + o0 + r) * I + i0 + j, wide));
        const float scale = s[i] = scale_of(reduce_amax(top), 0);
        for (long r = 0; r < rows; r++)
            for (long j = 0; j < width; j += 16) {
                const long at = (e * O + o0 + r) * I + i0 + j;
                _mm_storeu_si128((__m128i *)(q + at), code16(load16(w, at, wide), _mm512_set1_ps(scale)));
            }
    }
}

/* Upper twelve bits of float16: six of mantissa, to nearest even, steps of 2^-20 below 2^-14. Input: |x| < 2^15 or NaN. */
INLINE __m512i to_e5m6(__m512 x) {
    const __m512i bits = _mm512_castps_si512(x), sign = _mm512_and_si512(_mm512_srli_epi32(bits, 20), _mm512_set1_epi32(0x800));
    const __m512 size = _mm512_abs_ps(x);
    const __m512i u = _mm512_castps_si512(size), odd = _mm512_and_si512(_mm512_srli_epi32(u, 17), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(u, _mm512_set1_epi32(0xffff)), odd);
    const __m512i normal = _mm512_sub_epi32(_mm512_srli_epi32(rounded, 17), _mm512_set1_epi32(112 << 6));
    const __m512 magic = _mm512_set1_ps(8.0f); /* its step is 2^-20 */
    const __m512i small = _mm512_sub_epi32(_mm512_castps_si512(_mm512_add_ps(size, magic)), _mm512_castps_si512(magic));
    const __mmask16 tiny = _mm512_cmp_ps_mask(size, _mm512_set1_ps(0x1p-14f), _CMP_LT_OQ);
    const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    return _mm512_mask_blend_epi32(nan, _mm512_or_si512(_mm512_mask_blend_epi32(tiny, normal, small), sign), _mm512_set1_epi32(0x7e0));
}

/* x (R, K) bfloat16 or float32 -> packed (R, 3 K / 2) bytes, scales (R, ceil K/128), powers of two. K: a multiple of 16. */
void pack_e5m6(const void *x, uint8_t *packed, float *s, long R, long K, long wide, int threads) {
    const long tiles = (K + SIDE - 1) / SIDE;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long r = 0; r < R; r++)
        for (long t = 0; t < tiles; t++) {
            const long from = r * K + t * SIDE, end = from + (K - t * SIDE < SIDE ? K - t * SIDE : SIDE);
            __m512 top = _mm512_setzero_ps();
            for (long i = from; i < end; i += 16) top = larger(top, load16(x, i, wide));
            const float scale = s[r * tiles + t] = scale_of(reduce_amax(top), 1) / 64.0f;
            for (long i = from; i < end; i += 16) {
                uint32_t w[16];
                _mm512_storeu_si512(w, to_e5m6(_mm512_div_ps(load16(x, i, wide), _mm512_set1_ps(scale))));
                uint8_t *out = packed + i / 2 * 3;
                for (int l = 0; l < 16; l += 2, out += 3)
                    out[0] = w[l] >> 4, out[1] = (w[l] & 15) << 4 | w[l + 1] >> 8, out[2] = w[l + 1];
            }
        }
}

/* packed (R, 3 K / 2), scales -> out (R, K) bfloat16. */
void unpack_e5m6(const uint8_t *packed, const float *s, bf16 *out, long R, long K, int threads) {
    const long tiles = (K + SIDE - 1) / SIDE;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long r = 0; r < R; r++)
        for (long k = 0; k < K; k += 16) {
            const uint8_t *in = packed + (r * K + k) / 2 * 3;
            uint16_t h[16];
            for (int l = 0; l < 16; l += 2, in += 3) h[l] = in[0] << 8 | (in[1] & 0xf0), h[l + 1] = in[1] << 12 | in[2] << 4;
            const __m512 v = _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)h));
            store_bf16(out + r * K + k, _mm512_mul_ps(v, _mm512_set1_ps(s[r * tiles + k / SIDE])));
        }
}

/* ---- products --------------------------------------------------------------------------------------------------------- */

/* One product: c (M, N) = sum over k of a[m, k] b[n, k], each 128 of k from the first on weighted with both scales.
   a: rows `lda` apart, k contiguous: codes with a scale each row and tile, or bfloat16 (sa null).
   b: k contiguous, rows `ldb` apart; or (b_by_k) n contiguous and the k-th `ldb` behind. Its scale: sb[n >> shift][tile]. */
typedef struct {
    const void *a; long lda; const float *sa; long sa_row;
    const fp8 *b; long ldb, b_by_k; const float *sb; long sb_row, sb_tile, shift;
    void *c; long ldc, wide, M, N, K;
} Product;
typedef struct { Table a, b; } Tables;
typedef struct { long chunk; uint32_t mask; } Adder; /* how often a partial sum is added, and the bits of a sum that are kept */
typedef struct { uint32_t *a, *b; bf16 *rows; float *c, *sa, *sb; } Space;
static Space carve(Arena *s) {
    Space w;
    w.a = take(s, DEPTH / 2 * ROWS * 4);
    w.b = take(s, DEPTH / 2 * BAND * 4);
    w.rows = take(s, ROWS * (DEPTH > BAND ? DEPTH : BAND) * 2);
    w.c = take(s, BAND * BAND * 4);
    w.sa = take(s, DEPTH / SIDE * ROWS * 4);
    w.sb = take(s, DEPTH / SIDE * BAND * 4);
    return w;
}

/* c (8 x up to 32) += (a times b over `pairs`) * sa * sb, and only the bits of `mask` stay. */
INLINE void scaled_tile(const int nv, long pairs, const uint32_t *a, const uint32_t *b, const float *sa, const float *sb, float *c,
                        uint32_t mask) {
    __m512 acc[8][2];
    for (int i = 0; i < 8; i++)
        for (int j = 0; j < nv; j++) acc[i][j] = _mm512_setzero_ps();
    for (long p = 0; p < pairs; p++, a += ROWS, b += LANES) {
        __m512bh bv[2];
        for (int j = 0; j < nv; j++) bv[j] = (__m512bh)_mm512_load_si512(b + 16 * j);
#pragma GCC unroll 8
        for (int i = 0; i < 8; i++) {
            const __m512bh av = (__m512bh)_mm512_set1_epi32(a[i]);
            for (int j = 0; j < nv; j++) acc[i][j] = _mm512_dpbf16_ps(acc[i][j], bv[j], av);
        }
    }
    for (int i = 0; i < 8; i++)
        for (int j = 0; j < nv; j++) {
            const __m512 scale = _mm512_mul_ps(_mm512_set1_ps(sa[i]), _mm512_loadu_ps(sb + 16 * j));
            const __m512 sum = _mm512_fmadd_ps(acc[i][j], scale, _mm512_loadu_ps(c + i * BAND + 16 * j));
            _mm512_storeu_ps(c + i * BAND + 16 * j, _mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(sum), _mm512_set1_epi32(mask))));
        }
}

/* Columns n0 to n0 + width of b, k0 to k0 + depth, as panels; and the scale of every column and tile. */
static void pack_b(const Product *p, const Table *t, Space w, long n0, long width, long k0, long depth) {
    const long padded = round_up(depth, 32), columns = round_up(width, LANES);
    for (long tile = 0; tile * SIDE < depth; tile++)
        for (long n = 0; n < columns; n++)
            w.sb[tile * BAND + n] = n < width ? p->sb[((n0 + n) >> p->shift) * p->sb_row + (k0 / SIDE + tile) * p->sb_tile] : 0.0f;
    if (p->b_by_k) {
        const long even = round_up(columns, 32);
        for (long k = 0; k < padded; k += 2) {
            bf16 *first = k < depth ? w.rows : NULL, *second = k + 1 < depth ? w.rows + BAND : NULL;
            if (first) decode(t, first, p->b + (k0 + k) * p->ldb + n0, width, even);
            if (second) decode(t, second, p->b + (k0 + k + 1) * p->ldb + n0, width, even);
            pack_pairs(w.b, padded / 2, k / 2, first, second, columns);
        }
        return;
    }
    for (long n = 0; n < columns; n += ROWS) {
        const bf16 *rows[ROWS];
        for (int i = 0; i < ROWS; i++) {
            rows[i] = n + i < width ? w.rows + i * DEPTH : NULL;
            if (rows[i]) decode(t, w.rows + i * DEPTH, p->b + (n0 + n + i) * p->ldb + k0, depth, padded);
        }
        pack_lanes(w.b + n / LANES * (padded / 2) * LANES + n % LANES, LANES, rows, padded);
    }
}

static void pack_a(const Product *p, const Table *t, Space w, long m, long last, long k0, long depth) {
    const long padded = round_up(depth, 32);
    const bf16 *rows[ROWS];
    for (int i = 0; i < ROWS; i++) {
        bf16 *row = w.rows + i * DEPTH;
        rows[i] = m + i < last ? row : NULL;
        for (long tile = 0; tile * SIDE < depth; tile++)
            w.sa[tile * ROWS + i] = m + i >= last ? 0.0f : p->sa ? p->sa[(m + i) * p->sa_row + k0 / SIDE + tile] : 1.0f;
        if (!rows[i]) continue;
        if (p->sa) decode(t, row, (const fp8 *)p->a + (m + i) * p->lda + k0, depth, padded);
        else {
            memcpy(row, (const bf16 *)p->a + (m + i) * p->lda + k0, depth * 2);
            memset(row + depth, 0, (padded - depth) * 2);
        }
    }
    pack_lanes(w.a, ROWS, rows, padded);
}

/* Rows m0 to m1 and columns n0 to n1 of one product. */
static void product_task(const Product *p, const Tables *t, Adder add, Space w, long m0, long m1, long n0, long n1) {
    for (long i = 0; i < m1 - m0; i++) memset(w.c + i * BAND, 0, round_up(n1 - n0, LANES) * 4);
    for (long i = m1 - m0; i < round_up(m1 - m0, 8); i++) memset(w.c + i * BAND, 0, round_up(n1 - n0, LANES) * 4);
    for (long k0 = 0; k0 < p->K; k0 += DEPTH) {
        const long depth = p->K - k0 < DEPTH ? p->K - k0 : DEPTH, pairs = round_up(depth, 32) / 2;
        pack_b(p, &t->b, w, n0, n1 - n0, k0, depth);
        for (long m = m0; m < m1; m += ROWS) {
            pack_a(p, &t->a, w, m, m1, k0, depth);
            for (long n = 0; n < n1 - n0; n += LANES)
                for (int i = 0; i < ROWS && m + i < m1; i += 8)
                    for (long q = 0; q < pairs; q += add.chunk / 2) {
                        const long count = pairs - q < add.chunk / 2 ? pairs - q : add.chunk / 2, tile = 2 * q / SIDE;
                        const uint32_t *b = w.b + (n / LANES * pairs + q) * LANES;
                        scaled_tile(2, count, w.a + q * ROWS + i, b, w.sa + tile * ROWS + i, w.sb + tile * BAND + n,
                                    w.c + (m - m0 + i) * BAND + n, add.mask);
                    }
        }
    }
    for (long m = m0; m < m1; m++)
        for (long n = n0; n < n1; n += 16) {
            const long left = n1 - n;
            const __mmask16 keep = left >= 16 ? 0xffff : (1u << left) - 1;
            const __m512 v = _mm512_loadu_ps(w.c + (m - m0) * BAND + n - n0);
            if (p->wide) _mm512_mask_storeu_ps((float *)p->c + m * p->ldc + n, keep, v);
            else _mm256_mask_storeu_epi16((bf16 *)p->c + m * p->ldc + n, keep, (__m256i)_mm512_cvtneps_pbh(v));
        }
}

static void run(const Product *products, long E, Tables tables, Adder add, int threads) {
    long most = 0, widest = 0;
    for (long e = 0; e < E; e++) {
        if (products[e].M > most) most = products[e].M;
        if (products[e].N > widest) widest = products[e].N;
    }
    const long down = (most + BAND - 1) / BAND, across = (widest + BAND - 1) / BAND;
    Arena size = {NULL, 0};
    carve(&size);
#pragma omp parallel num_threads(threads)
    {
        Arena scratch = {allocate(size.used), 0};
        const Space w = carve(&scratch);
#pragma omp for schedule(dynamic)
        for (long i = 0; i < E * down * across; i++) {
            const Product *p = products + i / (down * across);
            const long m = i / across % down * BAND, n = i % across * BAND;
            if (m < p->M && n < p->N)
                product_task(p, &tables, add, w, m, m + BAND < p->M ? m + BAND : p->M, n, n + BAND < p->N ? n + BAND : p->N);
        }
        free(scratch.base);
    }
}

/* y (R, N): rows of expert e from offsets[e] on times b[e]. a: codes (R, K) with sa (R, ceil K/128), or bfloat16 with sa null.
   b (E, N, K), its strides given: k contiguous, or n (b_by_k); sb (E, ...) with a scale of (n >> shift, tile). */
void fp8_grouped_mm(const void *a, const float *sa, const fp8 *b, const float *sb, const int64_t *offsets, void *y, long N, long K,
                    long E, long b_expert, long ldb, long b_by_k, long sb_expert, long sb_row, long sb_tile, long shift, long wide,
                    long a_e5m2, long chunk, long mask, int threads) {
    Product *products = allocate(E * sizeof(Product));
    const long tiles = (K + SIDE - 1) / SIDE;
    for (long e = 0; e < E; e++) {
        const long r = offsets[e];
        products[e] = (Product){(const char *)a + r * K * (sa ? 1 : 2), K, sa ? sa + r * tiles : NULL, tiles, b + e * b_expert, ldb,
                                b_by_k, sb + e * sb_expert, sb_row, sb_tile, shift, (char *)y + r * N * (wide ? 4 : 2), N, wide,
                                offsets[e + 1] - r, N, K};
    }
    run(products, E, (Tables){table_of(a_e5m2), table_of(0)}, (Adder){chunk, (uint32_t)mask}, threads);
    free(products);
}

/* dw (E, N, K) float32 = sum over the expert's rows r of a[n, r] b[k, r]: codes (N, R), (K, R) with scales (N, T), (K, T). */
void fp8_grouped_wgrad(const fp8 *a, const float *sa, const fp8 *b, const float *sb, const int64_t *offsets, float *dw, long R, long N,
                       long K, long E, long a_e5m2, long chunk, long mask, int threads) {
    Product *products = allocate(E * sizeof(Product));
    const long T = R / SIDE + E;
    for (long e = 0; e < E; e++) {
        const long r = offsets[e], tile = r / SIDE + e;
        products[e] = (Product){a + r, R, sa + tile, T, b + r, R, 0, sb + tile, T, 1, 0, dw + e * N * K, K, 1, N, K, offsets[e + 1] - r};
    }
    run(products, E, (Tables){table_of(a_e5m2), table_of(0)}, (Adder){chunk, (uint32_t)mask}, threads);
    free(products);
}
