/* One new token of each sequence attends to the pages of its sequence, in float32, on one core.
 *
 * A pass over the keys and the values of a page while the softmax is kept running ("online"): the
 * whole step reads KV once, at the speed of memory. The heads of a group share each key and value.
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
#define PIECE 16 /* Tokens folded at a time: their keys and values stay in the first cache. */
#define AHEAD 16 /* Rows fetched ahead. */

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
#define PARTS (DIM / 16)

static inline float total(lanes x) {
    float sum = 0;
    for (int lane = 0; lane < 16; lane++) sum += x[lane];
    return sum;
}

static void scores_of(const float *query, const float *keys, int count, float *scores) {
    lanes q[PARTS];
    for (int part = 0; part < PARTS; part++) q[part] = *(const lanes *)(query + part * 16);
    for (int t = 0; t < count; t++) {
        const float *key = keys + t * DIM;
        lanes sum = q[0] * *(const lanes *)key;
        for (int part = 1; part < PARTS; part++) sum += q[part] * *(const lanes *)(key + part * 16);
        for (int part = 0; part < PARTS; part++) __builtin_prefetch(key + (AHEAD * PARTS + part) * 16);
        scores[t] = total(sum);
    }
}

/* Scores to weights in place: the running top score and sum of weights take them in. */
static float weights_of(float *scores, int count, float *top, float *sum) {
    float best = *top, added = 0;
    for (int t = 0; t < count; t++) best = scores[t] > best ? scores[t] : best;
    float kept = *top == -INFINITY ? 0 : exponential(*top - best);
    for (int t = 0; t < count; t++) {
        scores[t] = exponential(scores[t] - best);
        added += scores[t];
    }
    *sum = *sum * kept + added;
    *top = best;
    return kept;
}

static void add_values(const float *weights, const float *values, int count, float kept, float *out) {
    lanes sums[PARTS];
    for (int part = 0; part < PARTS; part++) sums[part] = *(lanes *)(out + part * 16) * kept;
    for (int t = 0; t < count; t++) {
        const float *value = values + t * DIM;
        for (int part = 0; part < PARTS; part++) {
            sums[part] += weights[t] * *(const lanes *)(value + part * 16);
            __builtin_prefetch(value + (AHEAD * PARTS + part) * 16);
        }
    }
    for (int part = 0; part < PARTS; part++) *(lanes *)(out + part * 16) = sums[part];
}

/* Fold a piece of a page into the running result; the heads of a group find it in the cache. */
static void fold(const float *query, const float *keys, const float *values, int group, int count,
                 float *top, float *sums, float *out) {
    float scores[GROUP_MAX][PIECE], kept[GROUP_MAX];
    for (int g = 0; g < group; g++) scores_of(query + g * DIM, keys, count, scores[g]);
    for (int g = 0; g < group; g++) kept[g] = weights_of(scores[g], count, top + g, sums + g);
    for (int g = 0; g < group; g++) add_values(scores[g], values, count, kept[g], out + g * DIM);
}

void paged_decode(const float *queries, const float *keys, const float *values,
                  const int64_t *pages, const int64_t *begins, const int64_t *lengths, float *out,
                  int64_t sequences, int64_t kv_heads, int64_t group, int64_t page_tokens) {
    for (int64_t s = 0; s < sequences; s++)
        for (int64_t h = 0; h < kv_heads; h++) {
            float top[GROUP_MAX], sums[GROUP_MAX];
            int64_t first = (s * kv_heads + h) * group * DIM, left = lengths[s];
            for (int64_t g = 0; g < group; g++) top[g] = -INFINITY, sums[g] = 0;
            for (int64_t d = 0; d < group * DIM; d++) out[first + d] = 0;
            for (int64_t p = begins[s]; left > 0; p++, left -= page_tokens) {
                int64_t at = (pages[p] * kv_heads + h) * page_tokens * DIM;
                int64_t count = left < page_tokens ? left : page_tokens;
                for (int64_t t = 0; t < count; t += PIECE)
                    fold(queries + first, keys + at + t * DIM, values + at + t * DIM, group,
                         count - t < PIECE ? count - t : PIECE, top, sums, out + first);
            }
            for (int64_t g = 0; g < group; g++)
                for (int64_t d = 0; d < DIM; d++) out[first + g * DIM + d] /= sums[g];
        }
}
