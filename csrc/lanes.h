// A warp's work as the CUDA kernels and their run on the host see it: lanes, and where a lane's elements are.
#pragma once

#include <cstdint>

#include "chunks.h"
#include "states.h"

namespace vsgd {

constexpr int kLanes = 32, kWarps = 4;
constexpr int kEach = 4;  // elements of a lane: for fp32, one widest access each operand
constexpr int64_t kTile = kLanes * kEach;
static_assert(kTile == kCodes, "a warp steps one block of codes");

// How many warps take a chunk: no more than an average one has tiles for. The others would keep a multiprocessor's registers
// for no more than reading the tables: three of four, where tensors have 64 elements. Where states have blocks it is one:
// instructions bind these, and what a warp does before its first tile is spread over all tiles of the chunk (sm_90: 139
// instructions an element of q8 instead of 151, 154 of packed16 instead of 164).
inline int warps_of(int64_t elements, int64_t chunks, Format format) {
  if (has_blocks(format)) return 1;
  const int64_t tiles = chunks ? (elements + chunks * kTile - 1) / (chunks * kTile) : 1;
  return int(tiles < 1 ? 1 : tiles < kWarps ? tiles : kWarps);
}

// How a launch's tensors are accessed: all addresses are multiples of 16 bytes, or not, or strides differ.
enum class Path { aligned, misaligned, strided };
template <Path path> using PathOf = Value<Path, path>;

// Calls run(PathOf<path>).
template <class Run>
auto with_path(Path path, const Run& run) {
  if (path == Path::aligned) return run(PathOf<Path::aligned>());
  if (path == Path::misaligned) return run(PathOf<Path::misaligned>());
  return run(PathOf<Path::strided>());
}

// On the device the calling lane's share of a warp's work, on the host each lane's in turn.
template <class Work>
VSGD_FN void each_lane(const Work& work) {
#ifdef __CUDA_ARCH__
  work(int(threadIdx.x % kLanes));
#else
  for (int lane = 0; lane < kLanes; ++lane) work(lane);
#endif
}

// A variable that each lane has its own of, across several `each_lane`.
template <class T>
class PerLane {
 public:
#ifdef __CUDA_ARCH__
  VSGD_FN T& operator[](int) { return mine_; }

 private:
  T mine_;
#else
  VSGD_FN T& operator[](int lane) { return all_[lane]; }

 private:
  T all_[kLanes];
#endif
};

// The largest of all lanes' numbers.
template <class Number>
VSGD_FN uint32_t largest_of_lanes(const Number& number) {
#ifdef __CUDA_ARCH__
  return __reduce_max_sync(0xffffffffu, number(int(threadIdx.x % kLanes)));
#else
  uint32_t largest = 0;
  for (int lane = 0; lane < kLanes; ++lane) largest = larger(largest, number(lane));
  return largest;
#endif
}

// The least of all lanes' numbers.
template <class Number>
VSGD_FN uint32_t least_of_lanes(const Number& number) {
#ifdef __CUDA_ARCH__
  return __reduce_min_sync(0xffffffffu, number(int(threadIdx.x % kLanes)));
#else
  uint32_t least = ~0u;
  for (int lane = 0; lane < kLanes; ++lane) least = smaller(least, number(lane));
  return least;
#endif
}

// The range of all lanes' ranges.
template <bool nan>
VSGD_FN Range range_of_lanes(PerLane<Range>& ranges, bool rate) {
  Range range;
  range.high = largest_of_lanes([&](int lane) { return ranges[lane].high; });
  if (rate) range.low = least_of_lanes([&](int lane) { return ranges[lane].low; });
  if (nan) range.nan = largest_of_lanes([&](int lane) { return ranges[lane].nan; });
  return range;
}

// A lane's elements of one operand; copied whole, it is one access.
template <class T>
struct alignas(sizeof(T) * kEach < 16 ? sizeof(T) * kEach : 16) Pack {
  T at[kEach];
};

// Which elements of a tensor a lane steps, and where they are.
template <Path path>
struct Place {
  int64_t first;  // the lane's first element
  int64_t numel;
  const int64_t* layout;  // the tensor's record, for Path::strided

  // AnyRow: one with `numel` and `layout`.
  template <class AnyRow>
  VSGD_FN Place(const AnyRow& row, const int64_t* layouts, int64_t tile, int lane)
      : first(tile + (path == Path::aligned ? lane * kEach : lane)), numel(row.numel), layout(layouts + row.layout) {}

  VSGD_FN int64_t element(int j) const { return first + (path == Path::aligned ? j : j * kLanes); }

  // Where element j of an operand is.
  VSGD_FN int64_t offset(int operand, int j) const {
    if (path != Path::strided) return element(j);
    const Layout record(layout);
    int64_t index = element(j), offset = 0;
    VSGD_NO_UNROLL for (int64_t d = record.dims - 1; d >= 0; --d) {
      offset += index % record.sizes[d] * record.of(operand)[d];
      index /= record.sizes[d];
    }
    return offset;
  }

  // kWhole: all of the lane's elements are there, side by side. from: elements that are skipped; of an address that moves on
  // in a loop nvcc does not see that it is the device memory's.
  template <bool kWhole, class T>
  VSGD_FN Pack<T> load(int64_t address, int operand, int64_t from = 0) const {
    const T* base = reinterpret_cast<const T*>(address) + from;
    if (kWhole) return *reinterpret_cast<const Pack<T>*>(base + first);
    Pack<T> pack{};
    VSGD_UNROLL for (int j = 0; j < kEach; ++j)
      if (element(j) < numel) pack.at[j] = base[offset(operand, j)];
    return pack;
  }

  template <bool kWhole, class T>
  VSGD_FN void store(int64_t address, int operand, const Pack<T>& pack) const {
    T* base = reinterpret_cast<T*>(address);
    if (kWhole) {
      *reinterpret_cast<Pack<T>*>(base + first) = pack;
    } else {
      VSGD_UNROLL for (int j = 0; j < kEach; ++j)
        if (element(j) < numel) base[offset(operand, j)] = pack.at[j];
    }
  }
};

}  // namespace vsgd
