// The CUDA kernel that adds samples: launches of samples_device.h's blocks on torch's current stream.
#include "cuda_device.h"
#include "samples_device.h"

namespace vsgd {
namespace {

template <class P, Path path>
__global__ void __launch_bounds__(kThreads) add_kernel(const SampleStep step) {
  add_warp<P, path>(step, blockIdx.x, threadIdx.x / kLanes);
}

}  // namespace

void add_samples_on_cuda(const SampleStep& step, int64_t dtype, Path path, int32_t device) {
  const DeviceGuard guard(device);
  dispatch_samples(dtype, path, [&](auto sample, auto path_of) {
    add_kernel<typename decltype(sample)::type, decltype(path_of)::value>
        <<<unsigned(step.chunks), unsigned(step.warps) * kLanes, 0, current_stream(device)>>>(step);
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace vsgd
