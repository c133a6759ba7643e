// Plain C++, one output row at a time: for tests, and as the meaning of the others.
#include <string.h>
#include "kernels.h"
namespace {
struct vi {
    int32_t sum;
    uint8_t at[4];
};
typedef float vf;
constexpr int W = 1, TILES[2] = {1, 1}, TOGETHER[2] = {0, 0};
constexpr float BIAS = 0.0f;
inline vi zero_i() { return vi{}; }
inline vf zero_f() { return 0.0f; }
inline vf set_f(float x) { return x; }
inline vf mul(vf a, vf b) { return a * b; }
inline vf fma(vf a, vf b, vf c) { return a * b + c; }
inline vi add_i(vi a, vi b) { return vi{a.sum + b.sum, {}}; }
inline vi shift_left_7(vi a) { return vi{a.sum * 128, {}}; }
inline vf to_float(vi a) { return (float)a.sum; }
inline vi bytes(const uint8_t *p) { return vi{0, {p[0], p[1], p[2], p[3]}}; }
inline vi low(vi a) {
    for (uint8_t &b : a.at) b &= 15;
    return a;
}
inline vi high(vi a) {
    for (uint8_t &b : a.at) b >>= 4;
    return a;
}
inline vi four(const int8_t *p) { return bytes((const uint8_t *)p); }
inline vi nibble_dot(vi sum, vi w, vi x) {
    for (int i = 0; i < 4; i++) sum.sum += w.at[i] * (int8_t)x.at[i];
    return sum;
}
inline vi nibbles(vi sum) { return sum; }
inline vi byte_dot(vi sum, vi w, vi x) {
    for (int i = 0; i < 4; i++) sum.sum += (w.at[i] - 128) * (int8_t)x.at[i];
    return sum;
}
inline vf halves(const void *p) {
    uint16_t half;
    memcpy(&half, p, 2);
    uint32_t rest = (uint32_t)(half & 0x7fff) << 13, sign = (uint32_t)(half & 0x8000) << 16;
    float value;
    memcpy(&value, &rest, 4);
    value *= 5.192296858534828e33f;  // 2^112 moves the exponent's bias, subnormal numbers included
    memcpy(&rest, &value, 4);
    if ((half & 0x7c00) == 0x7c00) rest |= 0x7f800000;  // infinite, or no number
    rest |= sign;
    memcpy(&value, &rest, 4);
    return value;
}
inline vf brains(const void *p) {
    uint16_t brain;
    memcpy(&brain, p, 2);
    const uint32_t bits = (uint32_t)brain << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}
inline vf floats(const void *p) {
    float value;
    memcpy(&value, p, 4);
    return value;
}
inline vf small_floats(const uint8_t *p) { return (float)*p; }
inline vf signed_floats(const uint8_t *p) { return (float)(int8_t)*p; }
inline void to_halves(uint16_t *p, vf v) {  // to the nearest, of two equally near ones the even one
    uint32_t bits;
    memcpy(&bits, &v, 4);
    const uint32_t sign = bits >> 16 & 0x8000, size = bits & 0x7fffffff;
    uint32_t half;
    if (size >= 0x7f800000) half = size > 0x7f800000 ? 0x7e00 : 0x7c00;
    else if (size >= 0x477ff000) half = 0x7c00;
    else if (size >= 0x38800000) half = (size - 0x38000000 + 0xfff + (size >> 13 & 1)) >> 13;
    else {  // subnormal: adding 2^-1 leaves steps of 2^-24 behind
        float magnitude;
        memcpy(&magnitude, &size, 4);
        magnitude += 0.5f;
        memcpy(&half, &magnitude, 4);
        half -= 0x3f000000;
    }
    *p = (uint16_t)(sign | half);
}
inline void store(float *p, vf v) { *p = v; }
}  // namespace
#include "tile.inc"
#include "rest.inc"
const Kernels kernels_generic = KERNELS("generic");
