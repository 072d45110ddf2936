#include <algorithm>
#include <map>
#include <mutex>
#include <tuple>

#include "device.h"

namespace hesskern::cuda {

namespace {

// What a block gets without asking.
constexpr size_t kDefaultShared = 48 << 10;

int current_ordinal() {
  int ordinal = 0;
  return cudaGetDevice(&ordinal) == cudaSuccess ? ordinal : 0;
}

Device ask(int ordinal) {
  const auto attribute = [&](cudaDeviceAttr which, int otherwise) {
    int value = 0;
    return cudaDeviceGetAttribute(&value, which, ordinal) == cudaSuccess ? value : otherwise;
  };
  Device device;
  device.processors = attribute(cudaDevAttrMultiProcessorCount, 1);
  device.shared = static_cast<size_t>(
      attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, static_cast<int>(kDefaultShared)));
  device.capability = 10 * attribute(cudaDevAttrComputeCapabilityMajor, 0) +
                      attribute(cudaDevAttrComputeCapabilityMinor, 0);
  return device;
}

std::mutex& lock() {
  static std::mutex mutex;
  return mutex;
}

}  // namespace

const Device& current_device() {
  // Places in a map stay where they are.
  static std::map<int, Device> known;
  const int ordinal = current_ordinal();
  const std::lock_guard<std::mutex> guard(lock());
  const auto found = known.find(ordinal);
  return found != known.end() ? found->second : known.emplace(ordinal, ask(ordinal)).first->second;
}

cudaError_t allow_shared(const void* kernel, size_t bytes) {
  if (bytes <= kDefaultShared) return cudaSuccess;
  static std::map<std::pair<int, const void*>, size_t> allowed;
  const int ordinal = current_ordinal();
  const std::lock_guard<std::mutex> guard(lock());
  size_t& most = allowed[{ordinal, kernel}];
  if (bytes <= most) return cudaSuccess;
  const cudaError_t error = cudaFuncSetAttribute(
      kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
  if (error == cudaSuccess) most = bytes;
  return error;
}

int resident_blocks(const void* kernel, int threads, size_t shared) {
  static std::map<std::tuple<int, const void*, int, size_t>, int> known;
  const int processors = current_device().processors;
  if (allow_shared(kernel, shared) != cudaSuccess) return 1;
  const int ordinal = current_ordinal();
  const std::lock_guard<std::mutex> guard(lock());
  int& blocks = known[{ordinal, kernel, threads, shared}];
  if (blocks == 0) {
    int each = 0;
    const cudaError_t error =
        cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, kernel, threads, shared);
    blocks = error == cudaSuccess ? std::max(each, 1) * processors : processors;
  }
  return blocks;
}

}  // namespace hesskern::cuda
