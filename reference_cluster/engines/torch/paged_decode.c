/* One new token of each sequence attends to the pages of its sequence, in float32, on one core.
 *
 * A pass over the keys and the values of a page while the softmax is kept running ("online"): the
 * whole step reads KV once, at the speed of memory. The heads of a group share each key and value.
 * A sequence is walked page by page with all heads, in the order of the addresses, and in pieces so
 * small that keys and values come in turn: two even streams that the hardware fetches ahead better
 * than any hint did.
 *
 * queries, out  [sequence, KV head, head of the group, DIM], queries scaled already
 * keys, values  [page, KV head, token of the page, DIM] of one layer
 * pages         the pages of all sequences one after another, those of s at [begins[s], begins[s+1])
 * lengths       tokens of each sequence, the new one included
 */
#include <math.h>
#include <stdint.h>

#ifndef DIM
#define DIM 64
#endif
#define GROUP_MAX 16
#define PIECE 16 /* Tokens folded at a time. */

/* exp(x) for x <= 0 within 2e-7 of it: 2^n times a polynomial; a library call is not vectorised. */
static inline float exponential(float x) {
    x = x < -87.0f ? -87.0f : x;
    float n = rintf(x * 1.44269504f);
    float r = x - n * 0.693359375f + n * 2.12194440e-4f;
    float y = 1.9875691500e-4f;
    y = y * r + 1.3981999507e-3f;
    y = y * r + 8.3334519073e-3f;
    y = y * r + 4.1665795894e-2f;
    y = y * r + 1.6666665459e-1f;
    y = y * r + 5.0000001201e-1f;
    y = y * r * r + r + 1.0f;
    union {
        int32_t bits;
        float value;
    } scale = {((int32_t)n + 127) << 23};
    return y * scale.value;
}

typedef float lanes __attribute__((vector_size(64), aligned(4), may_alias));
typedef float half __attribute__((vector_size(32)));
typedef float quarter __attribute__((vector_size(16)));
#define PARTS (DIM / 16)

/* By halves: as a loop over the lanes it becomes 15 additions one after another. */
static inline float total(lanes x) {
    union {
        lanes whole;
        half halves[2];
    } x16 = {x};
    union {
        half whole;
        quarter halves[2];
    } x8 = {x16.halves[0] + x16.halves[1]};
    quarter x4 = x8.halves[0] + x8.halves[1];
    return (x4[0] + x4[1]) + (x4[2] + x4[3]);
}

static inline void scores_of(const float *query, const float *keys, int count, float *scores) {
    lanes q[PARTS];
    for (int part = 0; part < PARTS; part++) q[part] = *(const lanes *)(query + part * 16);
    for (int t = 0; t < count; t++) {
        const float *key = keys + t * DIM;
        lanes sum = q[0] * *(const lanes *)key;
        for (int part = 1; part < PARTS; part++) sum += q[part] * *(const lanes *)(key + part * 16);
        scores[t] = total(sum);
    }
    for (int t = count; t < PIECE; t++) scores[t] = -INFINITY;
}

/* Scores to weights in place: the running top score and sum of weights take them in. */
static inline float weights_of(float *scores, float *top, float *sum) {
    float best = *top, added = 0;
    for (int t = 0; t < PIECE; t++) best = scores[t] > best ? scores[t] : best;
    float kept = exponential(*top - best);
    for (int t = 0; t < PIECE; t++) {
        scores[t] = exponential(scores[t] - best);
        added += scores[t];
    }
    *sum = *sum * kept + added;
    *top = best;
    return kept;
}

static inline void add_values(const float *weights, const float *values, int count, float kept,
                              float *out) {
    lanes sums[PARTS];
    for (int part = 0; part < PARTS; part++) sums[part] = *(lanes *)(out + part * 16) * kept;
    for (int t = 0; t < count; t++)
        for (int part = 0; part < PARTS; part++)
            sums[part] += weights[t] * *(const lanes *)(values + t * DIM + part * 16);
    for (int part = 0; part < PARTS; part++) *(lanes *)(out + part * 16) = sums[part];
}

/* Fold a piece of a page into the running result; the heads of a group find it in the cache. */
static inline void fold(const float *query, const float *keys, const float *values, int group,
                        int count, float *top, float *sums, float *out) {
    float scores[GROUP_MAX][PIECE], kept[GROUP_MAX];
    for (int g = 0; g < group; g++) scores_of(query + g * DIM, keys, count, scores[g]);
    for (int g = 0; g < group; g++) kept[g] = weights_of(scores[g], top + g, sums + g);
    for (int g = 0; g < group; g++) add_values(scores[g], values, count, kept[g], out + g * DIM);
}

/* One sequence: its queries and results [head, DIM], its pages, its tokens. */
static inline void attend(const float *queries, const float *keys, const float *values,
                          const int64_t *pages, int64_t left, float *out, int64_t kv_heads,
                          int64_t group, int64_t page_tokens) {
    int64_t heads = kv_heads * group;
    float top[heads], sums[heads];
    for (int64_t head = 0; head < heads; head++) top[head] = -INFINITY, sums[head] = 0;
    for (int64_t d = 0; d < heads * DIM; d++) out[d] = 0;
    for (; left > 0; pages++, left -= page_tokens)
        for (int64_t h = 0; h < kv_heads; h++) {
            int64_t at = (*pages * kv_heads + h) * page_tokens * DIM, first = h * group;
            int64_t count = left < page_tokens ? left : page_tokens;
            for (int64_t t = 0; t < count; t += PIECE)
                fold(queries + first * DIM, keys + at + t * DIM, values + at + t * DIM, group,
                     count - t < PIECE ? count - t : PIECE, top + first, sums + first,
                     out + first * DIM);
        }
    for (int64_t head = 0; head < heads; head++)
        for (int64_t d = 0; d < DIM; d++) out[head * DIM + d] /= sums[head];
}

void paged_decode(const float *queries, const float *keys, const float *values,
                  const int64_t *pages, const int64_t *begins, const int64_t *lengths, float *out,
                  int64_t sequences, int64_t kv_heads, int64_t group, int64_t page_tokens) {
    for (int64_t s = 0; s < sequences; s++) {
        int64_t first = s * kv_heads * group * DIM;
        attend(queries + first, keys, values, pages + begins[s], lengths[s], out + first, kv_heads,
               group, page_tokens);
    }
}
