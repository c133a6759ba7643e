// NEON with dot products of bytes (ARMv8.2): 4 output rows in a vector.
#include <arm_neon.h>
#include "kernels.h"
namespace {
typedef int32x4_t vi;
typedef float32x4_t vf;
constexpr int W = 4, TILES[2] = {8, 4}, TOGETHER[2] = {4, 2};
constexpr float BIAS = 0.0f;
inline vi zero_i() { return vdupq_n_s32(0); }
inline vf zero_f() { return vdupq_n_f32(0.0f); }
inline vf set_f(float x) { return vdupq_n_f32(x); }
inline vf mul(vf a, vf b) { return vmulq_f32(a, b); }
inline vf fma(vf a, vf b, vf c) { return vfmaq_f32(c, a, b); }
inline vi add_i(vi a, vi b) { return vaddq_s32(a, b); }
inline vi shift_left_7(vi a) { return vshlq_n_s32(a, 7); }
inline vf to_float(vi a) { return vcvtq_f32_s32(a); }
inline vi bytes(const uint8_t *p) { return vreinterpretq_s32_u8(vld1q_u8(p)); }
inline vi low(vi a) { return vreinterpretq_s32_u8(vandq_u8(vreinterpretq_u8_s32(a), vdupq_n_u8(15))); }
inline vi high(vi a) { return vreinterpretq_s32_u8(vshrq_n_u8(vreinterpretq_u8_s32(a), 4)); }
inline vi four(const int8_t *p) {
    int32_t v;
    __builtin_memcpy(&v, p, 4);
    return vdupq_n_s32(v);
}
inline vi nibble_dot(vi sum, vi w, vi x) { return vdotq_s32(sum, vreinterpretq_s8_s32(w), vreinterpretq_s8_s32(x)); }
inline vi nibbles(vi sum) { return sum; }
inline vi byte_dot(vi sum, vi w, vi x) {
    const int8x16_t v = vreinterpretq_s8_u8(veorq_u8(vreinterpretq_u8_s32(w), vdupq_n_u8(128)));
    return vdotq_s32(sum, v, vreinterpretq_s8_s32(x));
}
inline vf halves(const void *p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16((const uint16_t *)p))); }
inline vf brains(const void *p) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16((const uint16_t *)p), 16)); }
inline vf floats(const void *p) { return vld1q_f32((const float *)p); }
inline vf small_floats(const uint8_t *p) { return vf{(float)p[0], (float)p[1], (float)p[2], (float)p[3]}; }
inline vf signed_floats(const uint8_t *p) {
    return vf{(float)(int8_t)p[0], (float)(int8_t)p[1], (float)(int8_t)p[2], (float)(int8_t)p[3]};
}
inline void to_halves(uint16_t *p, vf v) { vst1_u16(p, vreinterpret_u16_f16(vcvt_f16_f32(v))); }
inline void store(float *p, vf v) { vst1q_f32(p, v); }
}  // namespace
#include "tile.inc"
#include "rest.inc"
const Kernels kernels_neon = KERNELS("neon");
