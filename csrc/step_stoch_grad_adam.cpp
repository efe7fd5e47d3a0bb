#include "step_rule.h"

template void vsgd::step_rule<vsgd::StochGradAdam>(const CpuStep&);
