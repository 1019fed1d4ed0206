// The gated activation of a Llama-like layer, act(gate) * up, forward and backward (arXiv 2002.05202).
#include "common.h"

namespace {

struct Silu {  // x sigmoid(x)
    static void of(Floats x, Floats& value, Floats& slope) {
        Floats s = reciprocal(1.0f + exponential(-x));
        value = x * s;
        slope = s * (1.0f + x * (1.0f - s));
    }
};

struct GeluTanh {  // 0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))
    static void of(Floats x, Floats& value, Floats& slope) {
        Floats inner = 0.7978845608f * (x + 0.044715f * x * x * x);
        Floats s = reciprocal(1.0f + exponential(-2.0f * inner));  // (1 + tanh(inner)) / 2
        value = x * s;
        slope = s + x * 2.0f * s * (1.0f - s) * 0.7978845608f * (1.0f + 3.0f * 0.044715f * x * x);
    }
};

template <typename Act, typename T>
void forward(const T* gate, const T* up, T* out, int64_t count, int threads) {
    int64_t whole = count / LANES * LANES, rest = count - whole;
    Floats value, slope;
#pragma omp parallel for num_threads(threads) schedule(static) private(value, slope)
    for (int64_t i = 0; i < whole; i += LANES) {
        Act::of(widen(gate + i), value, slope);
        narrow(value * widen(up + i), out + i);
    }
    if (rest) {
        Act::of(widen_some(gate + whole, rest), value, slope);
        narrow_some(value * widen_some(up + whole, rest), out + whole, rest);
    }
}

template <typename Act, typename T>
void backward(const T* dout, const T* gate, const T* up, T* dgate, T* dup, int64_t count, int threads) {
    int64_t whole = count / LANES * LANES, rest = count - whole;
    Floats value, slope;
#pragma omp parallel for num_threads(threads) schedule(static) private(value, slope)
    for (int64_t i = 0; i < whole; i += LANES) {
        Floats d = widen(dout + i);
        Act::of(widen(gate + i), value, slope);
        narrow(d * widen(up + i) * slope, dgate + i);
        narrow(d * value, dup + i);
    }
    if (rest) {
        Floats d = widen_some(dout + whole, rest);
        Act::of(widen_some(gate + whole, rest), value, slope);
        narrow_some(d * widen_some(up + whole, rest) * slope, dgate + whole, rest);
        narrow_some(d * value, dup + whole, rest);
    }
}

}  // namespace

#define GATED(ACT, NAME, CLASS, T)                                                                                   \
    KERNEL int ACT##_##NAME(const T* gate, const T* up, T* out, int64_t count, int threads) {                       \
        forward<CLASS>(gate, up, out, count, threads);                                                                \
        return 0;                                                                                                     \
    }                                                                                                                \
    KERNEL int ACT##_backward_##NAME(const T* dout, const T* gate, const T* up, T* dgate, T* dup, int64_t count,    \
                                      int threads) {                                                                 \
        backward<CLASS>(dout, gate, up, dgate, dup, count, threads);                                                  \
        return 0;                                                                                                     \
    }

GATED(silu, f32, Silu, float)
GATED(silu, bf16, Silu, bf16)
GATED(gelu_tanh, f32, GeluTanh, float)
GATED(gelu_tanh, bf16, GeluTanh, bf16)
