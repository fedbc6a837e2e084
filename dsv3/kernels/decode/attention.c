/* q_h·k = [W_UKᵀ q_nope ; q_pe]·[c ; k_pe] and o_h = W_UV sum p·c: every head reads the C + R cached numbers themselves.

   A page of 64 keys is a block. Blocks are taken in order from position 0, so a row's numbers depend on its position alone;
   a block behind the row's own position, read because another row of the task needs it, changes nothing. Softmax runs along:
   greatest score so far, sum of weights, and weighted sum of latents, scaled down when a greater score comes. */
#include "attention.h"

#include "product.h"

static long padded(long n) { return round_up(n, LANES); }

long attention_floats(const Model *m) {
    const long width = padded(m->rank + m->rope);
    return 2 * QUERIES * width + 2 * PAGE * width + m->nope * padded(m->rank) + QUERIES * (PAGE + 1 + LANES) + LANES;
}
AttentionWork carve_attention(const Model *m, float *at) {
    const long width = padded(m->rank + m->rope);
    AttentionWork w;
    w.absorbed = at;
    w.keys = w.absorbed + QUERIES * width;
    w.page = w.keys + PAGE * width;
    w.up = w.page + PAGE * width;
    w.scores = w.up + m->nope * padded(m->rank);
    w.sums = w.scores + QUERIES * PAGE;
    w.totals = w.sums + QUERIES * width;
    w.greatest = w.totals + QUERIES * LANES;
    return w;
}

/* Absorbed queries of the task, rows of a head together, times the softmax scale in powers of two. */
static void absorb(const Model *m, const Layer *layer, const AttentionWork *w, long rows, long head, long heads, const float *q,
                   const float *cos, const float *sin) {
    const long C = m->rank, R = m->rope, n = m->nope, each = n + R, width = padded(C + R), up = padded(C);
    const float scale = m->scale * LOG2E;
    for (long h = 0; h < heads; h++) {
        float *out = w->absorbed + h * rows * width;
        const long row = (head + h) * (n + m->value);
        const float *b = (const float *)layer->kv_b.at + row * C;
        if (layer->kv_b.kind != FLOAT32 || C % LANES) {
            for (long i = 0; i < n; i++) widen_row(&layer->kv_b, row + i, w->up + i * up);
            b = w->up;
        }
        mix(rows, up, n, q + (head + h) * each, m->heads * each, b, up, out, width, 0);
        for (long r = 0; r < rows; r++) {
            float *o = out + r * width;
            const float *pe = q + (r * m->heads + head + h) * each + n, *c = cos + r * R / 2, *s = sin + r * R / 2;
            for (long i = 0; i < R / 2; i++) {
                const float even = pe[2 * i], odd = pe[2 * i + 1];
                o[C + 2 * i] = even * c[i] - odd * s[i];
                o[C + 2 * i + 1] = even * s[i] + odd * c[i];
            }
            for (long i = 0; i < C + R; i++) o[i] *= scale;
        }
    }
}

/* Bytes that will be read soon. */
INLINE void fetch(const char *at, long bytes) {
    for (long i = 0; i < bytes; i += 64) __builtin_prefetch(at + i, 0, 2);
}

/* A page's first keys as columns, keys[c][key], and as float32 rows where they are not that already. */
static const float *read_page(const Model *m, const AttentionWork *w, const char *at, int kind, long keys, long *row) {
    const long width = m->rank + m->rope, even = padded(width);
    const float *rows = (const float *)at;
    *row = width;
    if (kind != FLOAT32 || width % LANES || m->rank % LANES) {
        for (long k = 0; k < keys; k++) widen_run(kind, at + k * width * size_of(kind), width, 1, w->page + k * even);
        rows = w->page;
        *row = even;
    }
    for (long k = 0; k < keys; k += LANES)
        for (long c = 0; c < width; c += LANES) {
            vf t[LANES];
            UNROLL for (int i = 0; i < LANES; i++) t[i] = load(rows + (k + i) * *row + c);
            transpose(t);
            UNROLL for (int i = 0; i < LANES; i++) store(w->keys + (c + i) * PAGE + k, t[i]);
        }
    return rows;
}

/* LANES queries at a time: scores become weights, and what a query has summed is scaled down to its greatest score so far. */
static void weigh(const AttentionWork *w, long queries, long keys, long width) {
    for (long q = 0; q < queries; q += LANES) {
        vf high[LANES];
        UNROLL for (int i = 0; i < LANES; i++) {
            const float *scores = w->scores + least(q + i, queries - 1) * PAGE;
            high[i] = load(scores);
            for (long k = LANES; k < keys; k += LANES) high[i] = greater(load(scores + k), high[i]);
        }
        const vf before = load(w->greatest + q), now = greater(fold_greatest(high), before);
        const vf factor = choose(before == now, splat(1), exp2v(before - now));
        store(w->greatest + q, now);
        for (long i = q; i < least(q + LANES, queries); i++) {
            float *scores = w->scores + i * PAGE, *sums = w->sums + i * width, *totals = w->totals + i * LANES;
            const float f = factor[i - q], best = now[i - q];
            vf t = load(totals);
            if (f != 1) {
                t *= f;
                for (long c = 0; c < padded(width); c += LANES) store(sums + c, load(sums + c) * f);
            }
            for (long k = 0; k < keys; k += LANES) {
                const vf p = exp2v(load(scores + k) - best);
                store(scores + k, p);
                t += p;
            }
            store(totals, t);
        }
    }
}

/* Keys of the page that begins at `start` that a row at this position sees. */
INLINE long seen(long position, long start) { return most(0, least(PAGE, position + 1 - start)); }

void attend(const Model *m, const Layer *layer, const AttentionWork *w, const char *latents, int kind, const int64_t *pages,
            long first_key, long position, long rows, long head, long heads, const float *q, const float *cos,
            const float *sin, float *out) {
    const long C = m->rank, width = padded(C + m->rope), up = padded(C), last = position + rows - 1, all = rows * heads;
    const long each = (C + m->rope) * size_of(kind); /* bytes of a key */
    fetch(latents + pages[0] * PAGE * each, seen(last, 0) * each);
    absorb(m, layer, w, rows, head, heads, q, cos, sin);
    memset(w->sums, 0, all * width * 4);
    memset(w->totals, 0, all * LANES * 4);
    for (long i = 0; i < all; i++) w->greatest[i] = -INFINITY;
    for (long start = 0; start <= last; start += PAGE) {
        const long from = start ? 0 : first_key, keys = round_up(seen(last, start), LANES);
        const int whole = !from && seen(position, start) == PAGE;
        long row;
        const char *page = latents + pages[start / PAGE] * PAGE * each;
        if (start + PAGE <= last) fetch(latents + pages[start / PAGE + 1] * PAGE * each, seen(last, start + PAGE) * each);
        const float *values = read_page(m, w, page, kind, keys, &row);
        mix(all, keys, C + m->rope, w->absorbed, width, w->keys, PAGE, w->scores, PAGE, 0);
        if (!whole)
            for (long i = 0; i < all; i++)
                for (long k = 0, to = seen(position + i % rows, start); k < keys; k++)
                    if (k < from || k >= to) w->scores[i * PAGE + k] = -INFINITY;
        weigh(w, all, keys, width);
        if (whole) mix(all, up, PAGE, w->scores, PAGE, values, row, w->sums, width, 1);
        else /* what a row does not see must not reach it, not even times zero: it may be no number */
            for (long r = 0; r < rows; r++)
                mix(heads, up, most(seen(position + r, start) - from, 0), w->scores + r * PAGE + from, rows * PAGE,
                    values + from * row, row, w->sums + r * width, rows * width, 1);
    }
    for (long i = 0; i < all; i++) {
        const float inverse = 1.0f / sum(load(w->totals + i * LANES));
        for (long c = 0; c < up; c += LANES) store(w->sums + i * width + c, load(w->sums + i * width + c) * inverse);
    }
    for (long h = 0; h < heads; h++)
        for (long v = 0; v < m->value; v += STRIP) {
            const long first = (head + h) * (m->nope + m->value) + m->nope + v, n = least(STRIP, m->value - v);
            for (long r = 0; r < rows; r += 4) {
                const float *x[4];
                float y[4][STRIP];
                const long R = least(4, rows - r);
                for (long i = 0; i < R; i++) x[i] = w->sums + (h * rows + r + i) * width;
                strip(&layer->kv_b, first, R, x, y);
                for (long i = 0; i < R; i++)
                    memcpy(out + ((r + i) * m->heads + head + h) * m->value + v, y[i], n * 4);
            }
        }
}
