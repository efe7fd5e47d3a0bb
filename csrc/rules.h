// The update rules, one element at a time, in the paper's order and in reference.py's names.
// Each rule is a type: its states and which of them are rates, its hyperparameters (columns of a row of the hyper table),
// the scalars of one step (double arithmetic, rounded once), and the update in two functions, so that the CPU can code the
// states while its divider is busy with the parameters. Gradients come multiplied by `sign`. Rates are doubled, as the
// authors store them.
#pragma once

#include <cmath>

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

// VSGD, Algorithm 1 (Eqs. 15-24).
struct Vsgd {
  static constexpr int states = 3;
  VSGD_FN static constexpr bool is_rate(int k) { return k != 0; }
  enum Hyper { lr, weight_decay, eps, maximize, ghattg, ps, tau1, tau2, shape_offset, hypers };

  template <class A>
  struct Scalars {
    A inv_a, pbg, pbhg, rho1, rho2, lr, decay, eps, t, sign;
  };

  template <class A>
  VSGD_FN static Scalars<A> scalars(double t, const double* h) {
    const double prior = prior_rate<A>(2.0 * h[ps]);
    Scalars<A> s;
    s.pbg = A(prior);
    s.pbhg = A(prior_rate<A>(2.0 * h[ps] * h[ghattg]));
    s.inv_a = A(1.0 / (prior + h[shape_offset] + (t == 1.0 ? 0.0 : 1.0)));
    s.rho1 = A(pow(t, -h[tau1]));
    s.rho2 = A(pow(t, -h[tau2]));
    s.lr = A(h[lr]);
    s.decay = A(1.0 - h[lr] * h[weight_decay]);
    s.eps = A(h[eps]);
    s.t = A(t);
    s.sign = h[maximize] != 0.0 ? A(-1) : A(1);
    return s;
  }

  // The variational updates: new states from a gradient. Returns what `move` needs beside them.
  template <class A>
  VSGD_FN static A infer(A ghat, A* state, const Scalars<A>& s) {
    A &mug = state[0], &bg = state[1], &bhg = state[2];
    A w = bg / (bg + bhg);                                                              // gain
    A sigma2 = at_least(bhg * w * s.inv_a, Bounds<A>::tiny);                            // 16
    A d = ghat - mug;
    A dg = w * d;                                                                       // mug' - mug
    A dghat = d - dg;                                                                   // ghat - mug'
    mug = mug + dg;                                                                     // 15
    bg = at_least(bg + s.rho1 * (s.pbg + (sigma2 + dg * dg) - bg), Bounds<A>::tiny);    // 18, 20
    bhg = at_least(bhg + s.rho2 * (s.pbhg + (sigma2 + dghat * dghat) - bhg), Bounds<A>::tiny);  // 19, 21
    return sigma2;
  }

  // The parameter step, from the first of the new states and what `infer` returned.
  template <class A>
  VSGD_FN static A move(A theta, A mug, A sigma2, const Scalars<A>& s) {
    return theta * s.decay - s.lr * (mug / (square_root(mug * mug + sigma2) + s.eps));  // 24
  }
};

}  // namespace vsgd
