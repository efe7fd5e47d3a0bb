// The update rules, one element at a time, in the paper's order and in reference.py's names.
// Each rule is a type: its name, its states (a mean first) and which of them are rates, whether it draws random numbers or
// takes a variance of samples, its hyperparameters (columns of a row of the hyper table), the scalars of one step (double
// arithmetic, rounded once), and the update in three functions, so that the CPU's divider can work for some elements while
// others are inferred: `gain`, of a mean; `infer`, the new states from a gradient, which returns what `move`, the parameter
// step, takes beside the new mean. Gradients come multiplied by `sign`. Rates are doubled, as the authors store them.
#pragma once

#include <cmath>
#include <string>

#include "numbers.h"

namespace vsgd {

VSGD_FN float square_root(float x) { return sqrtf(x); }
VSGD_FN double square_root(double x) { return sqrt(x); }

// A prior rate, within what the arithmetic type can hold.
template <class A>
VSGD_FN double prior_rate(double rate) {
  constexpr double floor = double(Bounds<A>::tiny), ceiling = double(Bounds<A>::big) * double(Bounds<A>::big);
  return rate < floor ? floor : rate > ceiling ? ceiling : rate;
}

// The hyperparameters with which every rule's row begins, and the scalars with which every rule's end.
struct CommonHyper {
  enum { lr, weight_decay, eps, maximize, count };
};
template <class S>
VSGD_FN void set_common(S& s, double t, const double* h) {
  using A = decltype(s.lr);
  s.lr = A(h[CommonHyper::lr]);
  s.decay = A(1.0 - h[CommonHyper::lr] * h[CommonHyper::weight_decay]);
  s.eps = A(h[CommonHyper::eps]);
  s.t = A(t);
  s.sign = h[CommonHyper::maximize] != 0.0 ? A(-1) : A(1);
}

// How much of a rate is left in step t: 1 - rho, rounded. What is new has the weight of 1 minus that, so that a rate whose
// gradients stay as they are does not drift.
template <class A>
VSGD_FN A kept_share(double t, double tau) { return A(1.0 - pow(t, -tau)); }

// The parameter step of the variational rules.
template <class A, class S>
VSGD_FN A variational_move(A theta, A mug, A sigma2, const S& s) {
  return fma(-s.lr, mug / (square_root(fma(mug, mug, sigma2)) + s.eps), theta * s.decay);  // 24
}

// Rates from a rule's `unfloored` to this one are stepped without the floors of its `infer`, none of which would take effect:
// (1 - rho) of a rate is left, for what it goes towards is not negative, and sigma2 is at least half the lesser rate times
// per_rate, but for rounding.
constexpr float kMostUnfloored = 0x1p54f;
// The least such rate; infinity where there is none.
VSGD_FN float least_unfloored(float rho, float per_rate) {
  const float floor = 4.0f * Bounds<float>::tiny / per_rate;
  return rho > 1.0f - 0x1p-10f ? INFINITY : floor > 0x1p-70f ? floor : 0x1p-70f;
}

// What `infer` takes beside an element's gradient, gain and states, where its rule says so.
template <class A>
struct Given {
  typename WordOf<A>::type word;  // where Rule::draws: random bits
  A variance;     // where Rule::samples: of the samples whose mean the gradient is
};

// VSGD, Algorithm 1 (Eqs. 15-24), and on samples, Appendix A.3.
template <bool kSamples>
struct VsgdOf {
  static constexpr int states = 3;
  static constexpr bool draws = false, samples = kSamples;
  VSGD_FN static constexpr bool is_rate(int k) { return k != 0; }
  enum Hyper { ghattg = CommonHyper::count, ps, tau1, tau2, shape_offset, hypers };

  template <class A>
  struct Scalars {
    A inv_a, kept1, kept2, rho1, rho2, prior1, prior2, lr, decay, eps, t, sign;
  };

  template <class A>
  VSGD_FN static Scalars<A> scalars(double t, const double* h) {
    const double pbg = prior_rate<A>(2.0 * h[ps]);
    Scalars<A> s;
    s.inv_a = A(1.0 / (pbg + h[shape_offset] + (t == 1.0 ? 0.0 : 1.0)));
    s.kept1 = kept_share<A>(t, h[tau1]);
    s.kept2 = kept_share<A>(t, h[tau2]);
    const double rho1 = 1.0 - double(s.kept1), rho2 = 1.0 - double(s.kept2);
    s.rho1 = A(rho1);
    s.rho2 = A(rho2);
    s.prior1 = A(rho1 * pbg);
    s.prior2 = A(rho2 * prior_rate<A>(2.0 * h[ps] * h[ghattg]));
    set_common(s, t, h);
    return s;
  }

  template <class A>
  VSGD_FN static A gain(const A* state, const Scalars<A>&) {
    A bg = state[1], bhg = state[2];
    return bg / (bg + bhg);
  }

  template <class A>
  VSGD_FN static A infer(A ghat, A w, A* state, const Scalars<A>& s, const Given<A>& given) {
    A &mug = state[0], &bg = state[1], &bhg = state[2];
    A sigma2 = at_least(bhg * w * s.inv_a, Bounds<A>::tiny);                            // 16
    A d = ghat - mug;
    A dg = w * d;                                                                       // mug' - mug
    A dghat = d - dg;                                                                   // ghat - mug'
    mug = mug + dg;                                                                     // 15
    A qg = fma(dg, dg, sigma2), qghat = fma(dghat, dghat, sigma2);
    if constexpr (kSamples) {  // 71-74: w^2 and (1 - w)^2 times the samples' mean square distance from mug
      qg = fma(w * w, given.variance, qg);
      qghat = fma((A(1) - w) * (A(1) - w), given.variance, qghat);
    }
    bg = at_least(fma(s.kept1, bg, fma(s.rho1, qg, s.prior1)), Bounds<A>::tiny);        // 18, 20
    bhg = at_least(fma(s.kept2, bhg, fma(s.rho2, qghat, s.prior2)), Bounds<A>::tiny);   // 19, 21
    return sigma2;
  }

  // From 2^-70 to 2^54 w is 2^-125 or more, and no digits are lost.
  VSGD_FN static float unfloored(const Scalars<float>& s) {
    return least_unfloored(s.rho1 > s.rho2 ? s.rho1 : s.rho2, s.inv_a);
  }

  template <class A>
  VSGD_FN static A move(A theta, A mug, A sigma2, const Scalars<A>& s) {
    return variational_move(theta, mug, sigma2, s);
  }
};

struct Vsgd : VsgdOf<false> {
  static constexpr const char* name = "vsgd";
};
struct SampleVsgd : VsgdOf<true> {
  static constexpr const char* name = "sample_vsgd";
};

// ConstantVSGD, Algorithm 2 (Eqs. 34-38).
struct ConstantVsgd {
  static constexpr const char* name = "constant_vsgd";
  static constexpr int states = 2;
  static constexpr bool draws = false, samples = false;
  VSGD_FN static constexpr bool is_rate(int k) { return k != 0; }
  enum Hyper { ghattg = CommonHyper::count, ps, tau, shape_offset, hypers };

  template <class A>
  struct Scalars {
    A w, inv_a, kept, rho, prior, lr, decay, eps, t, sign;
  };

  template <class A>
  VSGD_FN static Scalars<A> scalars(double t, const double* h) {
    const double pb = prior_rate<A>(2.0 * h[ps]);
    Scalars<A> s;
    s.w = A(1.0 / (h[ghattg] + 1.0));
    s.inv_a = A(1.0 / (pb + h[shape_offset] + (t == 1.0 ? 0.0 : 2.0)));
    s.kept = kept_share<A>(t, h[tau]);
    const double rho = 1.0 - double(s.kept);
    s.rho = A(rho);
    s.prior = A(rho * pb);
    set_common(s, t, h);
    return s;
  }

  template <class A>
  VSGD_FN static A gain(const A*, const Scalars<A>& s) { return s.w; }

  template <class A>
  VSGD_FN static A infer(A ghat, A w, A* state, const Scalars<A>& s, const Given<A>&) {
    A &mug = state[0], &b = state[1];
    A sigma2 = at_least(b * w * s.inv_a, Bounds<A>::tiny);                              // 35
    A d = ghat - mug;
    A dg = w * d;                                                                       // mug' - mug
    A dghat = d - dg;                                                                   // ghat - mug'
    mug = mug + dg;                                                                     // 34
    // 36 to 38: (sigma2 + dghat^2) + K_g (sigma2 + dg^2), which is this, for w = 1 / (K_g + 1)
    b = at_least(fma(s.kept, b, fma(s.rho, fma(b, s.inv_a, d * dghat), s.prior)), Bounds<A>::tiny);
    return sigma2;
  }

  VSGD_FN static float unfloored(const Scalars<float>& s) { return least_unfloored(s.rho, s.w * s.inv_a); }

  template <class A>
  VSGD_FN static A move(A theta, A mug, A sigma2, const Scalars<A>& s) {
    return variational_move(theta, mug, sigma2, s);
  }
};

// 1 - beta^t, without cancellation.
VSGD_FN double complement(double beta, double t) { return beta > 0.0 ? -expm1(t * log(beta)) : 1.0; }

// StochGradAdam, Algorithm 1 of Yun's paper.
struct StochGradAdam {
  static constexpr const char* name = "stoch_grad_adam";
  static constexpr int states = 2;
  static constexpr bool draws = true, samples = false;
  VSGD_FN static constexpr bool is_rate(int k) { return k != 0; }
  enum Hyper { beta1 = CommonHyper::count, beta2, decay, sampling_rate, hypers };

  template <class A>
  struct Scalars {
    A kept, beta1, gain1, beta2, gain2, m_scale, v_scale, lr, decay, eps, t, sign;
  };

  template <class A>
  VSGD_FN static Scalars<A> scalars(double t, const double* h) {
    Scalars<A> s;
    s.kept = A(ceil(h[sampling_rate] * 0x1p24));
    s.beta1 = A(h[beta1] * h[decay]);
    s.gain1 = A(1.0 - h[beta1] * h[decay]);
    s.beta2 = A(h[beta2]);
    s.gain2 = A(1.0 - h[beta2]);
    s.m_scale = A(1.0 / complement(h[beta1], t));
    s.v_scale = A(1.0 / complement(h[beta2], t));
    set_common(s, t, h);
    return s;
  }

  template <class A>
  VSGD_FN static A gain(const A*, const Scalars<A>& s) { return s.gain1; }

  template <class A>
  VSGD_FN static A infer(A ghat, A gain1, A* state, const Scalars<A>& s, const Given<A>& given) {
    A &m = state[0], &v = state[1];
    A phi = one_below(given.word, s.kept) * ghat;                                         // U = (word >> 8) 2^-24
    m = fma(s.beta1, m, gain1 * phi);
    v = always_at_least(fma(s.beta2, v, s.gain2 * (phi * phi)), Bounds<A>::tiny);
    return v;
  }

  // Its floor always takes effect: elements that were not chosen yet, or have no gradients, lie on it.
  VSGD_FN static float unfloored(const Scalars<float>&) { return Bounds<float>::tiny; }

  template <class A>
  VSGD_FN static A move(A theta, A m, A v, const Scalars<A>& s) {
    return fma(-s.lr, (m * s.m_scale) / (square_root(v * s.v_scale) + s.eps), theta * s.decay);
  }
};

template <class... Rules>
struct RuleList {
  // Calls run(Type<Rule>) for the rule of that name; false where there is none.
  template <class Run>
  static bool with(const std::string& name, const Run& run) {
    return ((name == Rules::name && (run(Type<Rules>()), true)) || ...);
  }
};

// Every rule that the kernels are compiled for.
using Rules = RuleList<Vsgd, SampleVsgd, ConstantVsgd, StochGradAdam>;

}  // namespace vsgd
