// Finds the instruction set and the rule; step_rule.h does the rest.
#include "step_cpu.h"

#include "isa.h"
#include "rules.h"

namespace vsgd {

Isa detect_isa() {
#if VSGD_X86
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    return VSGD_BY_HAND && __builtin_cpu_supports("avx512vbmi") ? Isa::avx512vbmi : Isa::avx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Isa::avx2;
#endif
  return Isa::baseline;
}

bool step_cpu(const std::string& rule, const CpuStep& step) {
  const bool overflowed = step.amp.found_inf && *step.amp.found_inf != 0.0f;
  return Rules::with(rule, [&](auto type) {
    if (!overflowed) step_rule<typename decltype(type)::type>(step);
  });
}

}  // namespace vsgd
