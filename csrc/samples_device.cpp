// The CUDA kernel that adds samples, its blocks run on the host, for tests where there is no GPU.
#ifdef __GNUC__
#pragma GCC optimize("O1")  // tests alone run it
#endif

#include "samples_device.h"

namespace vsgd {

void add_samples_on_host(const SampleStep& step, int64_t dtype, Path path) {
  dispatch_samples(dtype, path, [&](auto sample, auto path_of) {
    for (int64_t chunk = 0; chunk < step.chunks; ++chunk)
      for (int warp = 0; warp < step.warps; ++warp)
        add_warp<typename decltype(sample)::type, decltype(path_of)::value>(step, chunk, warp);
  });
}

}  // namespace vsgd
