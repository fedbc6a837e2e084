#include "product.h"

INLINE vf tail_of(const float *x, long K) { /* the last numbers of x, in the window's last lanes; zeros before them */
    const long n = K % LANES;
    float window[LANES] = {0};
    if (K < LANES) {
        memcpy(window, x, n * 4);
        return load(window);
    }
    return (vf)((vi)load(x + K - LANES) & ((vi){COUNT} >= (int32_t)(LANES - n)));
}
INLINE vf weight_tail(int kind, const char *w, long K, vf scale) { /* the same window of a row of weights, whole */
    if (K >= LANES) return widen(kind, w + (K - LANES) * size_of(kind), scale);
    char window[4 * LANES] = {0};
    memcpy(window, w, K * size_of(kind));
    return widen(kind, window, scale);
}

/* Sums of R rows with O outputs, lanes not yet folded: a[r * O + o]. */
INLINE void tile(const int kind, const int R, const int O, const char *const *w, const float *const *scales, long K,
                 const float *const *x, vf *a) {
    const long size = size_of(kind), ahead = 8 * K * size, whole = K / LANES * LANES, block = kind == FP8 ? BLOCK : whole;
    vf s[8], xs[4]; /* of fixed sizes: arrays as long as an argument stay in memory */
    UNROLL for (int i = 0; i < R * O; i++) a[i] = splat(0);
    UNROLL for (int o = 0; o < O; o++) s[o] = splat(0);
    for (long from = 0, b = 0; from < whole; from += block, b++) {
        const long end = least(from + block, whole);
        if (kind == FP8) UNROLL for (int o = 0; o < O; o++) s[o] = splat(scales[o][b] * 0x1p120f);
        for (long k = from; k < end; k += LANES) {
            UNROLL for (int r = 0; r < R; r++) {
                xs[r] = load(x[r] + k);
                KEEP(xs[r]);
            }
            UNROLL for (int o = 0; o < O; o++) {
                vf v = widen(kind, w[o] + k * size, s[o]);
                if (R > 1) KEEP(v);
                __builtin_prefetch(w[o] + k * size + ahead, 0, 2); /* the next strip */
                UNROLL for (int r = 0; r < R; r++) a[r * O + o] += xs[r] * v;
            }
        }
    }
    if (whole == K) return;
    if (kind == FP8) UNROLL for (int o = 0; o < O; o++) s[o] = splat(scales[o][K / BLOCK] * 0x1p120f);
    UNROLL for (int r = 0; r < R; r++) xs[r] = tail_of(x[r], K);
    UNROLL for (int o = 0; o < O; o++) {
        const vf v = weight_tail(kind, w[o], K, s[o]);
        UNROLL for (int r = 0; r < R; r++) a[r * O + o] += xs[r] * v;
    }
}
INLINE void fold_all(vf *a, float *y) { /* sixteen sums */
    UNROLL for (int i = 0; i < STRIP; i += LANES) store(y + i, fold(a + i));
}

INLINE void strip_as(const int kind, const int R, const Matrix *m, long first, const float *const x[4], float y[4][STRIP]) {
    enum { ROWS = STRIP };
    const char *w[ROWS];
    const float *scales[ROWS];
    const long last = m->rows - 1, bytes = m->width * size_of(kind);
    UNROLL for (int o = 0; o < STRIP; o++) {
        const long row = least(first + o, last);
        w[o] = m->at + row * bytes;
        scales[o] = kind == FP8 ? m->scales + row / BLOCK * m->scale_width : NULL;
    }
    vf a[STRIP];
    float t[STRIP];
    if (R == 1) { /* sixteen streams at once would need more addresses than there are registers */
        UNROLL for (int o = 0; o < STRIP; o += 4) tile(kind, 1, 4, w + o, scales + o, m->width, x, a + o);
        fold_all(a, y[0]);
        return;
    }
    enum { SIXTEEN = STRIP };
    const int O = SIXTEEN / R;
    for (int o = 0; o < STRIP; o += O) {
        tile(kind, R, O, w + o, scales + o, m->width, x, a);
        fold_all(a, t);
        UNROLL for (int r = 0; r < R; r++) memcpy(y[r] + o, t + r * O, O * 4);
    }
}
INLINE void strip_rows(const int kind, const Matrix *m, long first, long rows, const float *const x[4], float y[4][STRIP]) {
    if (rows == 1) strip_as(kind, 1, m, first, x, y);
    else if (rows == 2) strip_as(kind, 2, m, first, x, y);
    else {
        const float *four[4] = {x[0], x[1], x[2], x[rows - 1]};
        strip_as(kind, 4, m, first, four, y);
    }
}
void strip(const Matrix *m, long first, long rows, const float *const x[4], float y[4][STRIP]) {
    if (m->kind == FLOAT32) strip_rows(FLOAT32, m, first, rows, x, y);
    else if (m->kind == BFLOAT16) strip_rows(BFLOAT16, m, first, rows, x, y);
    else strip_rows(FP8, m, first, rows, x, y);
}

Matrix for_rows(const Matrix *m, long *first, long rows, float *panel) {
    if (m->kind == FLOAT32 || rows <= 8 || m->width < LANES) return *m;
    const long K = m->width, n = least(STRIP, m->rows - *first);
    for (long r = 0; r < n; r++) widen_row(m, *first + r, panel + r * K); /* the next row overwrites the zeros behind one */
    *first = 0;
    return (Matrix){(const char *)panel, NULL, FLOAT32, n, K, 0, 0, 0};
}

void widen_run(int kind, const char *at, long n, float scale, float *out) {
    const long whole = n / LANES * LANES, size = size_of(kind);
    const vf s = splat(scale * 0x1p120f);
    for (long k = 0; k < whole; k += LANES) store(out + k, widen(kind, at + k * size, s));
    if (whole == n) return;
    char window[4 * LANES] = {0};
    memcpy(window, at + whole * size, (n - whole) * size);
    store(out + whole, widen(kind, window, s));
}
void widen_row(const Matrix *m, long r, float *out) {
    const char *at = m->at + r * m->width * size_of((int)m->kind);
    if (m->kind != FP8) {
        widen_run((int)m->kind, at, m->width, 1, out);
        return;
    }
    const float *scales = m->scales + r / BLOCK * m->scale_width;
    for (long k = 0; k < m->width; k += BLOCK) widen_run(FP8, at + k, least(BLOCK, m->width - k), scales[k / BLOCK], out + k);
}

INLINE void mix_tile(const int R, const int V, long K, const float *a, long a_row, const float *b, long b_row, float *y,
                     long y_row, int add) {
    vf s[24], row[4];
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int v = 0; v < V; v++) s[r * V + v] = add ? load(y + r * y_row + v * LANES) : splat(0);
    for (long k = 0; k < K; k++) {
        UNROLL for (int v = 0; v < V; v++) row[v] = load(b + k * b_row + v * LANES);
        UNROLL for (int r = 0; r < R; r++) {
            const vf x = splat(a[r * a_row + k]);
            UNROLL for (int v = 0; v < V; v++) s[r * V + v] += x * row[v];
        }
    }
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int v = 0; v < V; v++) store(y + r * y_row + v * LANES, s[r * V + v]);
}
INLINE void mix_rows(const int R, long width, long K, const float *a, long a_row, const float *b, long b_row, float *y,
                     long y_row, int add) {
    long c = 0;
    for (; c + 4 * LANES <= width; c += 4 * LANES) mix_tile(R, 4, K, a, a_row, b + c, b_row, y + c, y_row, add);
    for (; c + 2 * LANES <= width; c += 2 * LANES) mix_tile(R, 2, K, a, a_row, b + c, b_row, y + c, y_row, add);
    for (; c < width; c += LANES) mix_tile(R, 1, K, a, a_row, b + c, b_row, y + c, y_row, add);
}
void mix(long rows, long width, long K, const float *a, long a_row, const float *b, long b_row, float *y, long y_row, int add) {
    long r = 0;
    for (; r + 6 <= rows; r += 6) mix_rows(6, width, K, a + r * a_row, a_row, b, b_row, y + r * y_row, y_row, add);
    for (; r + 4 <= rows; r += 4) mix_rows(4, width, K, a + r * a_row, a_row, b, b_row, y + r * y_row, y_row, add);
    for (; r + 2 <= rows; r += 2) mix_rows(2, width, K, a + r * a_row, a_row, b, b_row, y + r * y_row, y_row, add);
    for (; r < rows; r++) mix_rows(1, width, K, a + r * a_row, a_row, b, b_row, y + r * y_row, y_row, add);
}

void rms_norm(const float *x, Vector w, long n, float eps, float *y) {
    const long whole = n / LANES * LANES, size = size_of((int)w.kind);
    vf squares = splat(0);
    for (long k = 0; k < whole; k += LANES) squares += load(x + k) * load(x + k);
    if (whole < n) {
        const vf t = tail_of(x, n);
        squares += t * t;
    }
    const float inverse = 1.0f / sqrtf(sum(squares) / (float)n + eps);
    for (long k = 0; k < whole; k += LANES) store(y + k, load(x + k) * inverse * widen((int)w.kind, w.at + k * size, splat(0)));
    for (long k = whole; k < n; k++) {
        const float weight = w.kind == FLOAT32 ? ((const float *)w.at)[k] : from_bf16(((const uint16_t *)w.at)[k]);
        y[k] = x[k] * inverse * weight;
    }
}
