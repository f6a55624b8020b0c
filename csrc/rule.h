// The rules: how a gradient entry becomes an update of v. Free of torch, the same code on the CPU and on a GPU;
// dgc/ops/accumulation.py is the twin of its numbers, and cpu/update.h has the same for eight entries at a time.
//
// Each rule is a struct of its numbers, in the order of their rows in the op's argument. It says how many tensors it
// keeps of an element, and its update() changes these and returns what is added to v.
#pragma once

#include "arithmetic.h"

namespace dgc {

enum class Accumulation : int64_t { kSum = 0, kMomentum = 1, kNesterov = 2, kAdam = 3 };

constexpr int kMaxKept = 2;

// Plain accumulation (paper, Algorithm 1).
struct Sum {
  static constexpr int kKept = 0;
  float decay;

  DGC_BOTH float update(float h, float*) const { return h; }
};

// Momentum correction (paper, section 3.1): mu*u + h is rounded twice, as torch's mul_().add_().
struct Momentum {
  static constexpr int kKept = 1;
  float decay, mu;

  DGC_BOTH float update(float h, float* kept) const { return kept[0] = add(multiply(mu, kept[0]), h); }
};

// The same with Nesterov's h + mu*u, which is rounded once, as torch's add(alpha=).
struct Nesterov {
  static constexpr int kKept = 1;
  float decay, mu;

  DGC_BOTH float update(float h, float* kept) const {
    kept[0] = add(multiply(mu, kept[0]), h);
    return multiply_add(mu, kept[0], h);
  }
};

// Adam with its direction taken of the gradient itself, since v adds directions up as m would. m serves s alone. m and
// s have the bits of torch's lerp_ and mul_().addcmul_() as these are vectorised, which is with fused additions; where
// the weight of lerp_ is 0.5 or more it starts from h, and so does this.
struct Adam {
  static constexpr int kKept = 2;
  float decay, weight, b2, c1, c2, step, root, eps;

  // |weight| < 0.5, as bits: CuPy's comparisons of numbers flush denormal ones.
  DGC_BOTH bool starts_from_m() const { return magnitude(weight) < float_bits(0.5f); }
  DGC_BOTH float coefficient() const { return starts_from_m() ? weight : subtract(weight, 1.0f); }

  DGC_BOTH float update(float h, float* kept) const {
    const float m = multiply_add(coefficient(), subtract(h, kept[0]), starts_from_m() ? kept[0] : h);
    const float of_h = multiply_add(multiply(c1, h), h, multiply(b2, kept[1]));
    const float s = multiply_add(multiply(c2, m), m, of_h);
    kept[0] = m;
    kept[1] = s;
    return divide(multiply(step, h), add(divide(square_root(s), root), eps));
  }
};

template <class Rule>
constexpr int kRows = sizeof(Rule) / sizeof(float);

// The numbers of a rule for one segment, out of float [numbers, segments].
template <class Rule>
DGC_BOTH inline Rule rule_of(const float* numbers, int64_t segments, int64_t segment) {
  Rule rule;
  auto* fields = reinterpret_cast<float*>(&rule);
  for (int row = 0; row < kRows<Rule>; ++row) fields[row] = numbers[row * segments + segment];
  return rule;
}

// Calls f with the struct of a rule; its numbers say nothing.
template <class F>
DGC_BOTH inline void with_rule(Accumulation rule, const F& f) {
  if (rule == Accumulation::kSum) return f(Sum{});
  if (rule == Accumulation::kMomentum) return f(Momentum{});
  if (rule == Accumulation::kNesterov) return f(Nesterov{});
  return f(Adam{});
}

// Accumulates one entry: what is kept of it, and v <- decay*v + update. Returns false and leaves everything as it is
// where a result is not finite. v was finite, so a non-finite h or momentum always shows in v' or, where Adam divides
// by it, in s': one test for each of these is enough. One of its weights c1 and c2 is not 0, so m' shows there.
template <class Rule>
DGC_BOTH inline bool accumulate(const Rule& rule, float h, float* const* kept, float* v) {
  float after[kMaxKept];
  for (int i = 0; i < Rule::kKept; ++i) after[i] = *kept[i];
  const float update = rule.update(h, after);
  const float new_v = add(multiply(rule.decay, *v), update);
  if (magnitude(new_v) >= kInfinity) return false;
  if (Rule::kKept > 1 && magnitude(after[1]) >= kInfinity) return false;
  for (int i = 0; i < Rule::kKept; ++i) *kept[i] = after[i];
  *v = new_v;
  return true;
}

}  // namespace dgc
