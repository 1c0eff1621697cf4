/* What a page can do at most: reading memory in eight streams, and arithmetic on registers. */
#include <stdint.h>
#include <wasm_simd128.h>

#define EXPORT __attribute__((visibility("default")))
enum { STREAMS = 8, LINE = 64, CHAINS = 12 };

EXPORT int32_t read_bytes(const char *from, int32_t bytes)
{
    const int32_t run = bytes / STREAMS / LINE * LINE;
    v128_t sums[STREAMS];
    for (int s = 0; s < STREAMS; s++) sums[s] = wasm_i32x4_splat(0);
    for (int32_t i = 0; i < run; i += LINE) {
#pragma clang loop unroll(full)
        for (int s = 0; s < STREAMS; s++) {
            const char *p = from + s * run + i;
            const v128_t low = wasm_v128_xor(wasm_v128_load(p), wasm_v128_load(p + 16));
            const v128_t high = wasm_v128_xor(wasm_v128_load(p + 32), wasm_v128_load(p + 48));
            sums[s] = wasm_v128_xor(sums[s], wasm_v128_xor(low, high));
        }
    }
    for (int s = 1; s < STREAMS; s++) sums[0] = wasm_v128_xor(sums[0], sums[s]);
    return wasm_i32x4_extract_lane(sums[0], 0) ^ wasm_i32x4_extract_lane(sums[0], 3);
}

/* 32 operations of 8-bit integers a vector. */
EXPORT int32_t peak_int8(int32_t loops, int32_t seed)
{
    v128_t a[CHAINS], x = wasm_i8x16_splat(seed);
    const v128_t y = wasm_i8x16_splat(3);
    for (int c = 0; c < CHAINS; c++) a[c] = wasm_i32x4_splat(c);
    for (int32_t n = 0; n < loops; n++) {
#pragma clang loop unroll(full)
        for (int c = 0; c < CHAINS; c++) a[c] = wasm_i32x4_relaxed_dot_i8x16_i7x16_add(x, y, a[c]);
        x = wasm_v128_xor(x, a[0]);
    }
    for (int c = 1; c < CHAINS; c++) a[0] = wasm_i32x4_add(a[0], a[c]);
    return wasm_i32x4_extract_lane(a[0], 0);
}

/* 16 operations of 16-bit integers a vector: what bytes of any value come to. */
EXPORT int32_t peak_int16(int32_t loops, int32_t seed)
{
    v128_t a[CHAINS], x = wasm_i16x8_splat(seed);
    const v128_t y = wasm_i16x8_splat(3);
    for (int c = 0; c < CHAINS; c++) a[c] = wasm_i32x4_splat(c);
    for (int32_t n = 0; n < loops; n++) {
#pragma clang loop unroll(full)
        for (int c = 0; c < CHAINS; c++) a[c] = wasm_i32x4_add(a[c], wasm_i32x4_dot_i16x8(x, y));
        x = wasm_v128_xor(x, a[0]);
    }
    for (int c = 1; c < CHAINS; c++) a[0] = wasm_i32x4_add(a[0], a[c]);
    return wasm_i32x4_extract_lane(a[0], 0);
}

/* 8 operations of 32-bit floats a vector. */
EXPORT float peak_f32(int32_t loops, float factor)
{
    v128_t a[CHAINS];
    const v128_t x = wasm_f32x4_splat(factor), y = wasm_f32x4_splat(1e-6f);
    for (int c = 0; c < CHAINS; c++) a[c] = wasm_f32x4_splat(c);
    for (int32_t n = 0; n < loops; n++) {
#pragma clang loop unroll(full)
        for (int c = 0; c < CHAINS; c++) a[c] = wasm_f32x4_relaxed_madd(a[c], x, y);
    }
    for (int c = 1; c < CHAINS; c++) a[0] = wasm_f32x4_add(a[0], a[c]);
    return wasm_f32x4_extract_lane(a[0], 0);
}
