#include "step_rule.h"

template void vsgd::step_rule<vsgd::SampleVsgd>(const CpuStep&);
