/* The arithmetic of the codecs. Contract, formats and byte order: kernels.py. The same bytes as reference.py on every
 * machine: only IEEE single precision in a fixed order (compile with -ffp-contract=off), no library, no state.
 * x: a group's values, [layers][heads][tokens][k_dim] then [..][v_dim] for each layer; little-endian machines only. */

#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef __AVX2__
#include <immintrin.h>
#endif

#define INLINE static inline __attribute__((always_inline))
#define LANES 8
#define HUGE_BITS 0x57800000 /* 2^48: what is larger, infinite or NaN is not coded, so 2^28 squares have a finite sum */
#define TINY_BITS 0x21800000 /* 2^-60: the smallest step */
#define GROUP 32             /* int4: values that share a step */

enum { BF16, F16, F32 };

typedef struct {
    int64_t layers, heads, tokens, k_dim, v_dim;
} Shape;

INLINE uint32_t bits(float f) { uint32_t u; memcpy(&u, &f, 4); return u; }
INLINE float real(uint32_t u) { float f; memcpy(&f, &u, 4); return f; }
INLINE int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int32_t clamp(int32_t x, int32_t low, int32_t high) { return x < low ? low : x > high ? high : x; }

/* To the nearest integer, ties to even, for |f| < 2^22: one addition. */
INLINE int32_t nearest(float f) { return (int32_t)bits(f + 12582912.0f) - 0x4b400000; }

INLINE float load(const void *restrict x, int64_t at, int kind) {
    if (kind == F32) return ((const float *)x)[at];
    uint32_t u = ((const uint16_t *)x)[at];
    if (kind == BF16) return real(u << 16);
    /* float16: 2^112 moves the exponent; what was infinite or NaN becomes larger than HUGE, so that nobody codes it. */
    uint32_t low = u & 0x7fff;
    uint32_t rest = bits(real(low << 13) * 0x1p112f);
    rest = low >= 0x7c00 ? 0x7f800000 : rest;
    return real(rest | (u & 0x8000) << 16);
}

INLINE void store(void *restrict x, int64_t at, float f, int kind) {
    if (kind == F32) { ((float *)x)[at] = f; return; }
    uint32_t u = bits(f), low = u & 0x7fffffff;
    if (kind == BF16) { ((uint16_t *)x)[at] = (uint16_t)((u + 0x8000) >> 16); return; }
    low = low < 0x477fe000 ? low : 0x477fe000; /* 65504, the largest float16 */
    uint32_t normal = (low + 0xfff + (low >> 13 & 1) - (112u << 23)) >> 13;
    uint32_t subnormal = bits(real(low) + 0.5f) - bits(0.5f);
    ((uint16_t *)x)[at] = (uint16_t)((low < 0x38800000 ? subnormal : normal) | (u >> 16 & 0x8000));
}

/* Numbers into values, sixteen at a time where AVX2 can: what compilers make of the loops takes half as long again. */
#ifdef __AVX2__
INLINE __m256 floats(__m128i bytes) { return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes)); }
INLINE __m256i rounded(__m256 f) {
    return _mm256_srli_epi32(_mm256_add_epi32(_mm256_castps_si256(f), _mm256_set1_epi32(0x8000)), 16);
}
INLINE void store16(void *x, int64_t at, __m256 f, __m256 g) {
    __m256i mixed = _mm256_packus_epi32(rounded(f), rounded(g));
    _mm256_storeu_si256((__m256i *)((uint16_t *)x + at), _mm256_permute4x64_epi64(mixed, 0xd8));
}
#define BY_SIXTEEN(values, low, high) /* of numbers at `from`, with f and g the first and the last eight */ \
    if (kind == BF16) \
        for (; d + 16 <= end; d += 16) { \
            __m128i here = values; \
            __m256 f = floats(here), g = floats(_mm_srli_si128(here, 8)); \
            store16(x, at + d, low, high); \
        }

/* The same with f and g the numbers at even and at odd places: two of them are a word of 32 bits already, so nothing has
 * to change its place, which takes a sixth less. What differs by channel has to lie in that order, too. */
#define BY_PAIRS(from, even, odd) \
    if (kind == BF16) \
        for (; d + 16 <= end; d += 16) { \
            __m256i both = _mm256_cvtepi8_epi16(LOAD16(from)); \
            __m256 f = _mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_slli_epi32(both, 16), 16)); \
            __m256 g = _mm256_cvtepi32_ps(_mm256_srai_epi32(both, 16)); \
            __m256i upper = _mm256_add_epi32(_mm256_castps_si256(odd), _mm256_set1_epi32(0x8000)); \
            _mm256_storeu_si256( \
                (__m256i *)((uint16_t *)x + at + d), _mm256_blend_epi16(rounded(even), upper, 0xaa) \
            ); \
        }
INLINE void pair(float *row, int64_t end, int kind) {
    if (kind == BF16)
        for (int64_t d = 0; d + 16 <= end; d += 16) {
            __m256 a = _mm256_loadu_ps(row + d), b = _mm256_loadu_ps(row + d + 8);
            for (int odd = 0; odd < 2; odd++) {
                __m256 some = odd ? _mm256_shuffle_ps(a, b, 0xdd) : _mm256_shuffle_ps(a, b, 0x88);
                some = _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(some), 0xd8));
                _mm256_storeu_ps(row + d + 8 * odd, some);
            }
        }
}
#else
#define BY_SIXTEEN(values, low, high)
#define BY_PAIRS(from, even, odd)
INLINE void pair(float *row, int64_t end, int kind) { (void)row, (void)end, (void)kind; }
#endif
#define LOAD16(from) _mm_loadu_si128((const __m128i *)(from))
#define AT(row, d) _mm256_loadu_ps(row + d)

/* value = number × step + near, with a step and a near a channel; both as `pair` leaves them. */
INLINE void put_keys(
    void *restrict x, int64_t at, const int8_t *restrict q, const float *restrict step, const float *restrict near,
    int64_t end, int kind
) {
    int64_t d = 0;
    if (near) {
        BY_PAIRS(
            q + d, _mm256_add_ps(_mm256_mul_ps(f, AT(step, d)), AT(near, d)),
            _mm256_add_ps(_mm256_mul_ps(g, AT(step, d + 8)), AT(near, d + 8))
        )
        for (; d < end; d++) store(x, at + d, (float)q[d] * step[d] + near[d], kind);
    } else {
        BY_PAIRS(q + d, _mm256_mul_ps(f, AT(step, d)), _mm256_mul_ps(g, AT(step, d + 8)))
        for (; d < end; d++) store(x, at + d, (float)q[d] * step[d], kind);
    }
}

/* value = number × step. */
INLINE void put_values(
    void *restrict x, int64_t at, const int8_t *restrict q, float step, int64_t end, int kind
) {
    int64_t d = 0;
    BY_PAIRS(q + d, _mm256_mul_ps(f, _mm256_set1_ps(step)), _mm256_mul_ps(g, _mm256_set1_ps(step)))
    for (; d < end; d++) store(x, at + d, (float)q[d] * step, kind);
}

/* value = (nibble + low) × step; the low nibbles are the first half. */
INLINE void put_nibbles(
    void *restrict x, int64_t at, const uint8_t *restrict q, const float *restrict step, const float *restrict low,
    int64_t dim, int kind
) {
    int64_t half = (dim + 1) / 2, d = 0, end = half;
    (void)end; /* only where AVX2 is */
    BY_SIXTEEN(
        _mm_and_si128(LOAD16(q + d), _mm_set1_epi8(15)), _mm256_mul_ps(_mm256_add_ps(f, AT(low, d)), AT(step, d)),
        _mm256_mul_ps(_mm256_add_ps(g, AT(low, d + 8)), AT(step, d + 8))
    )
    for (; d < half; d++) store(x, at + d, ((float)(q[d] & 15) + low[d]) * step[d], kind);
    end = dim;
    BY_SIXTEEN(
        _mm_and_si128(_mm_srli_epi16(LOAD16(q + d - half), 4), _mm_set1_epi8(15)),
        _mm256_mul_ps(_mm256_add_ps(f, AT(low, d)), AT(step, d)),
        _mm256_mul_ps(_mm256_add_ps(g, AT(low, d + 8)), AT(step, d + 8))
    )
    for (; d < dim; d++) store(x, at + d, ((float)(q[d - half] >> 4) + low[d]) * step[d], kind);
}

INLINE int32_t magnitude(float f) { return (int32_t)(bits(f) & 0x7fffffff); }
INLINE int32_t larger(int32_t a, int32_t b) { return a > b ? a : b; }

/* One head's values as floats, from token `skip` on; returns the largest magnitude's bits. */
INLINE int32_t load_head(float *restrict to, const void *restrict x, int64_t at, int64_t count, int kind) {
    int32_t most = 0;
    for (int64_t i = 0; i < count; i++) {
        float f = load(x, at + i, kind);
        to[i] = f;
        most = larger(most, magnitude(f));
    }
    return most;
}

INLINE int32_t largest(const float *restrict x, int64_t count) {
    int32_t most = 0;
    for (int64_t i = 0; i < count; i++) most = larger(most, magnitude(x[i]));
    return most;
}

/* Sum of squares in eight lanes: lane j adds elements j, j + 8, … in order; then the lanes are added in pairs. */
INLINE float fold(const float *restrict lane) {
    return ((lane[0] + lane[4]) + (lane[2] + lane[6])) + ((lane[1] + lane[5]) + (lane[3] + lane[7]));
}

INLINE float sum(const float *restrict x, int64_t count) {
    float lane[LANES] = {0};
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES)
        for (int j = 0; j < LANES; j++) lane[j] += x[i + j];
    for (int j = 0; i + j < count; j++) lane[j] += x[i + j];
    return fold(lane);
}

INLINE float sum_of_squares(const float *restrict x, int64_t count) {
    float lane[LANES] = {0};
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES)
        for (int j = 0; j < LANES; j++) lane[j] += x[i + j] * x[i + j];
    for (int j = 0; i + j < count; j++) lane[j] += x[i + j] * x[i + j];
    return fold(lane);
}

INLINE float root(float f) { return __builtin_sqrtf(f); }

/* ---- int8 ---- */

typedef struct {
    uint8_t *k_tops;  /* [layers][heads] exponent of the largest key */
    uint16_t *v_tops; /* [layers] */
    uint8_t *k_levels; /* [layers][heads][(k_dim + 1) / 2], two channels a byte: half octaves below the top */
    uint8_t *v_levels; /* [layers][heads][tokens] */
    int8_t *q;
} Int8;

INLINE Int8 int8_parts(uint8_t *stored, Shape s) {
    int64_t heads = s.layers * s.heads;
    Int8 p;
    p.v_tops = (uint16_t *)stored;
    p.k_tops = stored + 2 * s.layers;
    p.k_levels = p.k_tops + heads;
    p.v_levels = p.k_levels + heads * ((s.k_dim + 1) / 2);
    p.q = (int8_t *)p.v_levels + (s.v_dim ? heads * s.tokens : 0);
    return p;
}

INLINE int int8_encode_as(const void *restrict x, uint8_t *restrict stored, Shape s, int kind) {
    Int8 p = int8_parts(stored, s);
    int64_t k_count = s.tokens * s.k_dim, v_count = s.tokens * s.v_dim, half = (s.k_dim + 1) / 2;
    int64_t room = k_count > v_count ? k_count : v_count;
    float *row = malloc(sizeof(float) * (size_t)(room + 2 * s.k_dim) + sizeof(int32_t) * (size_t)(s.heads * s.tokens));
    if (!row) return 0;
    float *inverse = row + room;
    int32_t *most = (int32_t *)(inverse + s.k_dim), *v_most = most + s.k_dim;
    int64_t at = 0;
    for (int64_t l = 0; l < s.layers; l++) {
        for (int64_t h = 0; h < s.heads; h++, at += k_count) {
            int64_t head = l * s.heads + h;
            int32_t top = load_head(row, x, at, k_count, kind);
            if (top > HUGE_BITS) { free(row); return 0; }
            top = larger(top, TINY_BITS + (8 << 23));
            top = (top + 0x7fffff) >> 23;
            p.k_tops[head] = (uint8_t)top;
            memset(most, 0, sizeof(int32_t) * (size_t)s.k_dim);
            for (int64_t t = 0; t < s.tokens; t++)
                for (int64_t d = 0; d < s.k_dim; d++) most[d] = larger(most[d], magnitude(row[t * s.k_dim + d]));
            memset(p.k_levels + head * half, 0, (size_t)half);
            for (int64_t d = 0; d < s.k_dim; d++) {
                int32_t level = clamp(2 * top - ((most[d] + 0x3fffff) >> 22), 0, 15);
                p.k_levels[head * half + d / 2] |= (uint8_t)(level << (d % 2 * 4));
                inverse[d] = 1.0f / (real((uint32_t)(2 * top - level) << 22) * (1.0f / 127.0f));
            }
            for (int64_t t = 0; t < s.tokens; t++)
                for (int64_t d = 0; d < s.k_dim; d++)
                    p.q[at + t * s.k_dim + d] = (int8_t)clamp(nearest(row[t * s.k_dim + d] * inverse[d]), -127, 127);
        }
        p.v_tops[l] = 0;
        if (!s.v_dim) continue;
        int32_t top = TINY_BITS;
        for (int64_t r = 0; r < s.heads * s.tokens; r++) {
            int32_t here = 0;
            for (int64_t d = 0; d < s.v_dim; d++) here = larger(here, magnitude(load(x, at + r * s.v_dim + d, kind)));
            if (here > HUGE_BITS) { free(row); return 0; }
            v_most[r] = (here + 0xfffff) >> 20;
            top = larger(top, here);
        }
        top = (top + 0xfffff) >> 20;
        p.v_tops[l] = (uint16_t)top;
        for (int64_t r = 0; r < s.heads * s.tokens; r++, at += s.v_dim) {
            int32_t level = clamp(top - v_most[r], 0, 255);
            p.v_levels[l * s.heads * s.tokens + r] = (uint8_t)level;
            float scale = 1.0f / (real((uint32_t)(top - level) << 20) * (1.0f / 127.0f));
            for (int64_t d = 0; d < s.v_dim; d++)
                p.q[at + d] = (int8_t)clamp(nearest(load(x, at + d, kind) * scale), -127, 127);
        }
    }
    free(row);
    return 1;
}

INLINE int int8_decode_as(const uint8_t *restrict stored, void *restrict x, Shape s, int kind) {
    Int8 p = int8_parts((uint8_t *)stored, s);
    int64_t half = (s.k_dim + 1) / 2, at = 0;
    float *step = malloc(sizeof(float) * 2 * (size_t)half);
    if (!step) return 0;
    for (int64_t l = 0; l < s.layers; l++) {
        for (int64_t h = 0; h < s.heads; h++) {
            int64_t head = l * s.heads + h;
            uint32_t top = 2u * p.k_tops[head];
            for (int64_t d = 0; d < half; d++) { /* in pairs, which compilers turn into vectors; room for one more */
                uint32_t both = p.k_levels[head * half + d];
                step[2 * d] = real((top - (both & 15)) << 22) * (1.0f / 127.0f);
                step[2 * d + 1] = real((top - (both >> 4)) << 22) * (1.0f / 127.0f);
            }
            pair(step, s.k_dim, kind);
            for (int64_t t = 0; t < s.tokens; t++, at += s.k_dim)
                put_keys(x, at, p.q + at, step, 0, s.k_dim, kind);
        }
        if (!s.v_dim) continue;
        for (int64_t r = l * s.heads * s.tokens; r < (l + 1) * s.heads * s.tokens; r++, at += s.v_dim) {
            float scale = real((uint32_t)(p.v_tops[l] - p.v_levels[r]) << 20) * (1.0f / 127.0f);
            put_values(x, at, p.q + at, scale, s.v_dim, kind);
        }
    }
    free(step);
    return 1;
}

/* ---- uqz ---- */

INLINE int uqz_encode_as(
    const void *restrict x, int64_t skip, float k_step, float v_step, float grid, uint16_t *restrict k_steps,
    uint16_t *restrict v_tops, int16_t *restrict means, uint8_t *restrict v_levels, int8_t *restrict k,
    int8_t *restrict v, Shape s, int kind
) {
    int64_t n = s.tokens - skip, k_count = n * s.k_dim, v_count = n * s.v_dim;
    float *row = malloc(sizeof(float) * (size_t)((k_count > s.heads * v_count ? k_count : s.heads * v_count) + 3 * s.k_dim + s.heads * n));
    if (!row) return 0;
    float *mean = row + (k_count > s.heads * v_count ? k_count : s.heads * v_count);
    float *near = mean + s.k_dim, *power = near + s.k_dim, *v_rms = power + s.k_dim;
    int64_t at = 0, kq = 0, vq = 0;
    for (int64_t l = 0; l < s.layers; l++) {
        for (int64_t h = 0; h < s.heads; h++, at += s.tokens * s.k_dim) {
            int64_t head = l * s.heads + h;
            if (load_head(row, x, at + skip * s.k_dim, k_count, kind) > HUGE_BITS) { free(row); return 0; }
            memset(mean, 0, sizeof(float) * (size_t)s.k_dim);
            memset(power, 0, sizeof(float) * (size_t)s.k_dim);
            for (int64_t t = 0; t < n; t++)
                for (int64_t d = 0; d < s.k_dim; d++) mean[d] += row[t * s.k_dim + d];
            for (int64_t d = 0; d < s.k_dim; d++) mean[d] /= (float)n;
            int32_t most = 0;
            for (int64_t t = 0; t < n; t++)
                for (int64_t d = 0; d < s.k_dim; d++) {
                    float rest = row[t * s.k_dim + d] - mean[d];
                    power[d] += rest * rest;
                    most = larger(most, magnitude(rest));
                }
            float step = k_step * root(sum(power, s.k_dim) / (float)k_count);
            float least = real((uint32_t)most) / 122.0f;
            step = step > least ? step : least;
            least = real((uint32_t)largest(mean, s.k_dim)) / (32000.0f * grid);
            step = step > least ? step : least;
            uint32_t code = (uint32_t)(larger((int32_t)bits(step), TINY_BITS) + 0xffff) >> 16;
            k_steps[head] = (uint16_t)code;
            step = real(code << 16);
            float wide = step * grid, inverse = 1.0f / step;
            for (int64_t d = 0; d < s.k_dim; d++) {
                int32_t m = clamp(nearest(mean[d] / wide), -32767, 32767);
                means[head * s.k_dim + d] = (int16_t)m;
                near[d] = (float)m * wide;
            }
            memset(k + kq, 0, (size_t)(skip * s.k_dim));
            kq += skip * s.k_dim;
            for (int64_t t = 0; t < n; t++, kq += s.k_dim)
                for (int64_t d = 0; d < s.k_dim; d++)
                    k[kq + d] = (int8_t)clamp(nearest((row[t * s.k_dim + d] - near[d]) * inverse), -127, 127);
        }
        v_tops[l] = 0;
        if (!s.v_dim) continue;
        int32_t top = TINY_BITS;
        for (int64_t h = 0; h < s.heads; h++) {
            float *here = row + h * v_count;
            if (load_head(here, x, at + (h * s.tokens + skip) * s.v_dim, v_count, kind) > HUGE_BITS) {
                free(row);
                return 0;
            }
            for (int64_t t = 0; t < n; t++) {
                float step = v_step * root(sum_of_squares(here + t * s.v_dim, s.v_dim) / (float)s.v_dim);
                float least = real((uint32_t)largest(here + t * s.v_dim, s.v_dim)) / 127.0f;
                v_rms[h * n + t] = step = step > least ? step : least;
                top = larger(top, (int32_t)bits(step));
            }
        }
        at += s.heads * s.tokens * s.v_dim;
        top = (top + 0x80000) >> 20;
        v_tops[l] = (uint16_t)top;
        for (int64_t h = 0; h < s.heads; h++) {
            uint8_t *levels = v_levels + (l * s.heads + h) * s.tokens;
            memset(levels, 0, (size_t)skip);
            memset(v + vq, 0, (size_t)(skip * s.v_dim));
            vq += skip * s.v_dim;
            for (int64_t t = 0; t < n; t++, vq += s.v_dim) {
                int32_t level = clamp(top - (int32_t)((bits(v_rms[h * n + t]) + 0x80000) >> 20), 0, 255);
                levels[skip + t] = (uint8_t)level;
                float inverse = 1.0f / real((uint32_t)(top - level) << 20);
                const float *here = row + h * v_count + t * s.v_dim;
                for (int64_t d = 0; d < s.v_dim; d++) v[vq + d] = (int8_t)clamp(nearest(here[d] * inverse), -127, 127);
            }
        }
    }
    free(row);
    return 1;
}

INLINE int uqz_decode_as(
    float grid, const uint16_t *restrict k_steps, const uint16_t *restrict v_tops, const int16_t *restrict means,
    const uint8_t *restrict v_levels, const int8_t *restrict k, const int8_t *restrict v, void *restrict x, Shape s,
    int kind
) {
    int64_t at = 0, kq = 0, vq = 0;
    float *near = malloc(sizeof(float) * 2 * (size_t)s.k_dim), *step = near + s.k_dim;
    if (!near) return 0;
    for (int64_t l = 0; l < s.layers; l++) {
        for (int64_t head = l * s.heads; head < (l + 1) * s.heads; head++) {
            float one = real((uint32_t)k_steps[head] << 16), wide = one * grid;
            for (int64_t d = 0; d < s.k_dim; d++) {
                step[d] = one;
                near[d] = (float)means[head * s.k_dim + d] * wide;
            }
            pair(near, s.k_dim, kind); /* `step` is the same throughout */
            for (int64_t t = 0; t < s.tokens; t++, at += s.k_dim, kq += s.k_dim)
                put_keys(x, at, k + kq, step, near, s.k_dim, kind);
        }
        if (!s.v_dim) continue;
        for (int64_t r = l * s.heads * s.tokens; r < (l + 1) * s.heads * s.tokens; r++) {
            put_values(x, at, v + vq, real((uint32_t)(v_tops[l] - v_levels[r]) << 20), s.v_dim, kind);
            at += s.v_dim;
            vq += s.v_dim;
        }
    }
    free(near);
    return 1;
}

/* ---- int4 ---- */

typedef struct {
    uint16_t *tops;               /* [layers][2] */
    uint8_t *k_levels, *v_levels; /* [layers][heads][groups of tokens][k_dim], [layers][heads][tokens][groups of dim] */
    int8_t *k_lows, *v_lows;      /* the same: the lowest value in steps */
    uint8_t *k, *v;               /* [layers][heads][tokens][(dim + 1) / 2]: the low nibble holds the first half */
} Int4;

INLINE Int4 int4_parts(uint8_t *stored, Shape s) {
    int64_t heads = s.layers * s.heads;
    int64_t k_side = heads * ((s.tokens + GROUP - 1) / GROUP) * s.k_dim;
    int64_t v_side = heads * s.tokens * ((s.v_dim + GROUP - 1) / GROUP);
    Int4 p;
    p.tops = (uint16_t *)stored;
    p.k_levels = stored + 4 * s.layers;
    p.k_lows = (int8_t *)p.k_levels + k_side;
    p.v_levels = (uint8_t *)p.k_lows + k_side;
    p.v_lows = (int8_t *)p.v_levels + v_side;
    p.k = (uint8_t *)p.v_lows + v_side;
    p.v = p.k + heads * s.tokens * ((s.k_dim + 1) / 2);
    return p;
}

/* The step (rounded up to three bits of mantissa) in which the values from low to high are sixteen numbers at most. */
INLINE int32_t int4_step(float low, float high) {
    float step = (high - low) * (1.0f / 15.0f);
    float least = real((uint32_t)larger(magnitude(low), magnitude(high))) * (1.0f / 112.0f);
    step = step > least ? step : least;
    return (larger((int32_t)bits(step), TINY_BITS) + 0xfffff) >> 20;
}

INLINE void pack_row(uint8_t *restrict to, const uint8_t *restrict q, int64_t dim) {
    int64_t half = (dim + 1) / 2;
    for (int64_t d = 0; d < dim - half; d++) to[d] = (uint8_t)(q[d] | q[half + d] << 4);
    if (dim % 2) to[half - 1] = q[half - 1];
}

INLINE int int4_encode_as(const void *restrict x, int64_t skip, uint8_t *restrict stored, Shape s, int kind) {
    Int4 p = int4_parts(stored, s);
    int64_t k_groups = (s.tokens + GROUP - 1) / GROUP, v_groups = (s.v_dim + GROUP - 1) / GROUP;
    int64_t k_count = s.heads * s.tokens * s.k_dim, v_count = s.heads * s.tokens * s.v_dim;
    int64_t room = k_count > v_count ? k_count : v_count;
    int64_t side = s.heads * (k_groups * s.k_dim > s.tokens * v_groups ? k_groups * s.k_dim : s.tokens * v_groups);
    int64_t dim = s.k_dim > s.v_dim ? s.k_dim : s.v_dim;
    float *row = malloc(sizeof(float) * (size_t)(room + 3 * side + dim) + (size_t)dim);
    if (!row) return 0;
    float *low = row + room, *high = low + side, *inverse = high + side;
    int32_t *code = (int32_t *)(inverse + dim);
    uint8_t *q = (uint8_t *)(code + side);
    int64_t at = 0;
    for (int64_t l = 0; l < s.layers; l++) {
        if (load_head(row, x, at, k_count, kind) > HUGE_BITS) { free(row); return 0; }
        at += k_count;
        int32_t top = 0;
        for (int64_t g = 0; g < s.heads * k_groups; g++) {
            int64_t h = g / k_groups, first = g % k_groups * GROUP, end = min64(first + GROUP, s.tokens);
            first = first < skip ? skip : first;
            float *lo = low + g * s.k_dim, *hi = high + g * s.k_dim;
            for (int64_t t = first; t < end; t++)
                for (int64_t d = 0; d < s.k_dim; d++) {
                    float f = row[(h * s.tokens + t) * s.k_dim + d];
                    lo[d] = t == first || f < lo[d] ? f : lo[d];
                    hi[d] = t == first || f > hi[d] ? f : hi[d];
                }
            for (int64_t d = 0; d < s.k_dim; d++) {
                code[g * s.k_dim + d] = int4_step(lo[d], hi[d]);
                top = larger(top, code[g * s.k_dim + d]);
            }
        }
        p.tops[2 * l] = (uint16_t)top;
        for (int64_t g = 0; g < s.heads * k_groups; g++) {
            int64_t h = g / k_groups, first = g % k_groups * GROUP, end = min64(first + GROUP, s.tokens);
            int64_t to = (l * s.heads * k_groups + g) * s.k_dim;
            for (int64_t d = 0; d < s.k_dim; d++) {
                int32_t level = clamp(top - code[g * s.k_dim + d], 0, 255);
                p.k_levels[to + d] = (uint8_t)level;
                inverse[d] = 1.0f / real((uint32_t)(top - level) << 20);
                p.k_lows[to + d] = (int8_t)nearest(low[g * s.k_dim + d] * inverse[d]);
            }
            for (int64_t t = first; t < end; t++) {
                const float *here = row + (h * s.tokens + t) * s.k_dim;
                if (t < skip) memset(q, 0, (size_t)s.k_dim);
                else
                    for (int64_t d = 0; d < s.k_dim; d++)
                        q[d] = (uint8_t)clamp(nearest(here[d] * inverse[d]) - p.k_lows[to + d], 0, 15);
                pack_row(p.k + ((l * s.heads + h) * s.tokens + t) * ((s.k_dim + 1) / 2), q, s.k_dim);
            }
        }
        p.tops[2 * l + 1] = 0;
        if (!s.v_dim) continue;
        if (load_head(row, x, at, v_count, kind) > HUGE_BITS) { free(row); return 0; }
        at += v_count;
        top = 0;
        for (int64_t r = 0; r < s.heads * s.tokens; r++)
            for (int64_t g = 0; g < v_groups; g++) {
                if (r % s.tokens < skip) continue;
                const float *here = row + r * s.v_dim + g * GROUP;
                int64_t count = min64(GROUP, s.v_dim - g * GROUP);
                float lo = here[0], hi = here[0];
                for (int64_t d = 1; d < count; d++) {
                    lo = here[d] < lo ? here[d] : lo;
                    hi = here[d] > hi ? here[d] : hi;
                }
                low[r * v_groups + g] = lo;
                code[r * v_groups + g] = int4_step(lo, hi);
                top = larger(top, code[r * v_groups + g]);
            }
        p.tops[2 * l + 1] = (uint16_t)top;
        for (int64_t r = 0; r < s.heads * s.tokens; r++) {
            int64_t to = (l * s.heads * s.tokens + r) * v_groups;
            for (int64_t g = 0; g < v_groups; g++) {
                const float *here = row + r * s.v_dim + g * GROUP;
                int64_t count = min64(GROUP, s.v_dim - g * GROUP);
                if (r % s.tokens < skip) {
                    p.v_levels[to + g] = 0;
                    p.v_lows[to + g] = 0;
                    memset(q + g * GROUP, 0, (size_t)count);
                    continue;
                }
                int32_t level = clamp(top - code[r * v_groups + g], 0, 255);
                float scale = 1.0f / real((uint32_t)(top - level) << 20);
                int32_t lowest = nearest(low[r * v_groups + g] * scale);
                p.v_levels[to + g] = (uint8_t)level;
                p.v_lows[to + g] = (int8_t)lowest;
                for (int64_t d = 0; d < count; d++)
                    q[g * GROUP + d] = (uint8_t)clamp(nearest(here[d] * scale) - lowest, 0, 15);
            }
            pack_row(p.v + (l * s.heads * s.tokens + r) * ((s.v_dim + 1) / 2), q, s.v_dim);
        }
    }
    free(row);
    return 1;
}

INLINE int int4_decode_as(const uint8_t *restrict stored, void *restrict x, Shape s, int kind) {
    Int4 p = int4_parts((uint8_t *)stored, s);
    int64_t k_groups = (s.tokens + GROUP - 1) / GROUP, v_groups = (s.v_dim + GROUP - 1) / GROUP, at = 0;
    int64_t dim = s.k_dim > s.v_dim ? s.k_dim : s.v_dim;
    float *step = malloc(sizeof(float) * 2 * (size_t)dim);
    if (!step) return 0;
    float *low = step + dim;
    for (int64_t l = 0; l < s.layers; l++) {
        for (int64_t head = l * s.heads; head < (l + 1) * s.heads; head++)
            for (int64_t t = 0; t < s.tokens; t++, at += s.k_dim) {
                int64_t from = (head * k_groups + t / GROUP) * s.k_dim;
                if (t % GROUP == 0)
                    for (int64_t d = 0; d < s.k_dim; d++) {
                        step[d] = real((uint32_t)(p.tops[2 * l] - p.k_levels[from + d]) << 20);
                        low[d] = (float)p.k_lows[from + d];
                    }
                put_nibbles(x, at, p.k + (head * s.tokens + t) * ((s.k_dim + 1) / 2), step, low, s.k_dim, kind);
            }
        if (!s.v_dim) continue;
        for (int64_t r = l * s.heads * s.tokens; r < (l + 1) * s.heads * s.tokens; r++, at += s.v_dim) {
            for (int64_t g = 0; g < v_groups; g++) {
                float scale = real((uint32_t)(p.tops[2 * l + 1] - p.v_levels[r * v_groups + g]) << 20);
                float lowest = (float)p.v_lows[r * v_groups + g];
                for (int64_t d = g * GROUP; d < min64(g * GROUP + GROUP, s.v_dim); d++) {
                    step[d] = scale;
                    low[d] = lowest;
                }
            }
            put_nibbles(x, at, p.v + r * ((s.v_dim + 1) / 2), step, low, s.v_dim, kind);
        }
    }
    free(step);
    return 1;
}

/* ---- one function a codec and direction; the type of the values is a constant inside ---- */

#define BY_KIND(call) \
    switch (kind) { \
    case BF16: { enum { K = BF16 }; return call; } \
    case F16: { enum { K = F16 }; return call; } \
    default: { enum { K = F32 }; return call; } \
    }

int kvkeep_int8_encode(const void *x, uint8_t *stored, const Shape *s, int kind) {
    BY_KIND(int8_encode_as(x, stored, *s, K))
}

int kvkeep_int8_decode(const uint8_t *stored, void *x, const Shape *s, int kind) {
    BY_KIND(int8_decode_as(stored, x, *s, K))
}

int kvkeep_int4_encode(const void *x, int64_t skip, uint8_t *stored, const Shape *s, int kind) {
    BY_KIND(int4_encode_as(x, skip, stored, *s, K))
}

int kvkeep_int4_decode(const uint8_t *stored, void *x, const Shape *s, int kind) {
    BY_KIND(int4_decode_as(stored, x, *s, K))
}

int kvkeep_uqz_encode(
    const void *x, int64_t skip, float k_step, float v_step, float grid, uint16_t *k_steps, uint16_t *v_tops,
    int16_t *means, uint8_t *v_levels, int8_t *k, int8_t *v, const Shape *s, int kind
) {
    BY_KIND(uqz_encode_as(x, skip, k_step, v_step, grid, k_steps, v_tops, means, v_levels, k, v, *s, K))
}

int kvkeep_uqz_decode(
    float grid, const uint16_t *k_steps, const uint16_t *v_tops, const int16_t *means, const uint8_t *v_levels,
    const int8_t *k, const int8_t *v, void *x, const Shape *s, int kind
) {
    BY_KIND(uqz_decode_as(grid, k_steps, v_tops, means, v_levels, k, v, x, *s, K))
}

/* ---- planes of the lossless codec ---- */

void kvkeep_split2(const uint16_t *restrict x, uint8_t *restrict top, uint8_t *restrict rest, int64_t count) {
    for (int64_t i = 0; i < count; i++) {
        top[i] = (uint8_t)(x[i] >> 7);
        rest[i] = (uint8_t)(x[i] >> 8 & 0x80 | x[i] & 0x7f);
    }
}

void kvkeep_join2(const uint8_t *restrict top, const uint8_t *restrict rest, uint16_t *restrict x, int64_t count) {
    for (int64_t i = 0; i < count; i++)
        x[i] = (uint16_t)(top[i] << 7 | (rest[i] & 0x80) << 8 | (rest[i] & 0x7f));
}

void kvkeep_split4(
    const uint32_t *restrict x, uint8_t *restrict top, uint8_t *restrict rest, uint8_t *restrict third,
    uint8_t *restrict fourth, int64_t count
) {
    for (int64_t i = 0; i < count; i++) {
        top[i] = (uint8_t)(x[i] >> 23);
        rest[i] = (uint8_t)(x[i] >> 24 & 0x80 | x[i] >> 16 & 0x7f);
        third[i] = (uint8_t)(x[i] >> 8);
        fourth[i] = (uint8_t)x[i];
    }
}

void kvkeep_join4(
    const uint8_t *restrict top, const uint8_t *restrict rest, const uint8_t *restrict third,
    const uint8_t *restrict fourth, uint32_t *restrict x, int64_t count
) {
    for (int64_t i = 0; i < count; i++)
        x[i] = (uint32_t)top[i] << 23 | (uint32_t)(rest[i] & 0x80) << 24 | (uint32_t)(rest[i] & 0x7f) << 16
             | (uint32_t)third[i] << 8 | fourth[i];
}
