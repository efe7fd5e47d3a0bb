// The CUDA kernels: launches of step_device.h's blocks on torch's current stream.
#include "cuda_device.h"
#include "step_device.h"

namespace vsgd {
namespace {

// From sm_100 on the same kernels take more registers: 72 instead of 64, q8 80, and 88 with samples.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
template <class Rule, Format format>
constexpr int kFewer = format != Format::q8 ? 1 : Rule::samples ? 3 : 2;
#else
template <class Rule, Format format>
constexpr int kFewer = 0;
#endif

// Blocks on a multiprocessor at least, which bounds a thread's registers: as many as come out with nothing spilled.
template <class Rule, class P, Format format, Path path>
constexpr int kResident = (sizeof(P) == 8                                     ? 3
                           : path != Path::aligned                            ? 5
                           : sizeof(P) == 2 || format == Format::packed16     ? 7
                                                                              : 8) -
                          kFewer<Rule, format>;

template <class Rule, class P, Format format, Path path>
__global__ void __launch_bounds__(kThreads, (kResident<Rule, P, format, path>)) step_kernel(const Step step) {
  step_warp<Rule, P, format, path>(step, blockIdx.x, threadIdx.x / kLanes);
}

template <class Rule, class P>
__global__ void __launch_bounds__(kThreads) count_kernel(const Count count) {
  const int64_t tensor = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (tensor < count.tensors) count_tensor<Rule, P>(count, tensor);
}

}  // namespace

bool step_on_cuda(const Step& step, const Kind& kind, int32_t device) {
  const DeviceGuard guard(device);
  const bool known = dispatch(kind, [&](auto rule, auto param, auto format, auto path) {
    step_kernel<typename decltype(rule)::type, typename decltype(param)::type, decltype(format)::value,
                decltype(path)::value>
        <<<unsigned(step.chunks), unsigned(step.warps) * kLanes, 0, current_stream(device)>>>(step);
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return known;
}

bool count_on_cuda(const Count& count, const Kind& kind, int32_t device) {
  const DeviceGuard guard(device);
  const bool known = dispatch(kind, [&](auto rule, auto param, auto, auto) {
    count_kernel<typename decltype(rule)::type, typename decltype(param)::type>
        <<<unsigned((count.tensors + kThreads - 1) / kThreads), kThreads, 0, current_stream(device)>>>(count);
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return known;
}

}  // namespace vsgd
