// The CUDA kernels' blocks, run on the host, for tests where there is no GPU; and counting, for steps to come.
#ifdef __GNUC__
#pragma GCC optimize("O1")  // tests alone run the steps; they compile in half the time
#endif

#include "step_device.h"

namespace vsgd {

bool step_on_host(const Step& step, const Kind& kind) {
  return dispatch(kind, [&](auto rule, auto param, auto format, auto path) {
    for (int64_t chunk = 0; chunk < step.chunks; ++chunk)
      for (int warp = 0; warp < step.warps; ++warp)
        step_warp<typename decltype(rule)::type, typename decltype(param)::type, decltype(format)::value,
                  decltype(path)::value>(step, chunk, warp);
  });
}

bool count_on_host(const Count& count, const Kind& kind) {
  return dispatch(kind, [&](auto rule, auto param, auto, auto) {
    for (int64_t tensor = 0; tensor < count.tensors; ++tensor)
      count_tensor<typename decltype(rule)::type, typename decltype(param)::type>(count, tensor);
  });
}

}  // namespace vsgd
