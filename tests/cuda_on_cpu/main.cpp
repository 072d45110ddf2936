// cuda_on_cpu [--few] [--kernels FILE] [OPERATOR]...: runs the kernels of csrc/cuda on the CPU
// against references in double precision; 0 if all agree. FILE: the addresses of the kernels that
// ran.
#include <cstdio>
#include <cstring>
#include <ctime>
#include <string>
#include <utility>
#include <vector>

#include "check.h"
#include "checks.h"

namespace hesskern::cuda::check {

void multiprocessor_count_is(int count) {
  emulation::device().processors = count;
}

}  // namespace hesskern::cuda::check

int main(int count, char** arguments) {
  // Checks show as they end, also in a file.
  std::setvbuf(stdout, nullptr, _IOLBF, 0);
  namespace check = hesskern::cuda::check;
  const std::vector<std::pair<std::string, void (*)(bool)>> all = {
      {"mirror", check::check_mirror},
      {"squares", check::check_squares},
      {"max_pool", check::check_max_pool},
      {"core", check::check_core},
      {"input_covariance", check::check_input_covariance},
      {"conv_input_covariance", check::check_conv_input_covariance},
      {"conv_few_channels", check::check_conv_few_channels},
      {"conv_lags", check::check_conv_lags},
      {"output_hessian", check::check_output_hessian},
      {"narrow_rows", check::check_narrow_rows},
      {"root_rows", check::check_root_rows},
      {"block_gram", check::check_block_gram},
      {"centre_split", check::check_centre_split},
      {"sampled_cross_entropy", check::check_sampled_cross_entropy},
      {"products", check::check_products},
      {"pack_along_k", check::check_pack_along_k},
      {"grouped_products", check::check_grouped_products},
      {"kron_matmul", check::check_kron_matmul},
      {"layer_hessian_matmul", check::check_layer_hessian_matmul},
      {"layer_hessian_coefficients", check::check_layer_hessian_coefficients},
  };
  bool few = false;
  const char* kernels = nullptr;
  std::vector<std::string> chosen;
  for (int i = 1; i < count; ++i) {
    if (std::strcmp(arguments[i], "--few") == 0) {
      few = true;
    } else if (std::strcmp(arguments[i], "--kernels") == 0 && i + 1 < count) {
      kernels = arguments[++i];
    } else {
      chosen.emplace_back(arguments[i]);
    }
  }
  int found = 0;
  for (const auto& [name, run] : all) {
    bool wanted = chosen.empty();
    for (const std::string& choice : chosen) wanted = wanted || choice == name;
    if (!wanted) continue;
    ++found;
    const std::clock_t begin = std::clock();
    run(few);
    std::printf("%s: %.1f s\n", name.c_str(),
                static_cast<double>(std::clock() - begin) / CLOCKS_PER_SEC);
  }
  if (!chosen.empty() && found != static_cast<int>(chosen.size())) {
    std::fprintf(stderr, "unknown operator among the arguments\n");
    return 2;
  }
  if (kernels != nullptr) {
    std::FILE* file = std::fopen(kernels, "w");
    if (file == nullptr) return 2;
    for (const void* kernel : hesskern::cuda::emulation::launched()) {
      std::fprintf(file, "%p\n", kernel);
    }
    std::fclose(file);
  }
  std::printf("%d checks failed\n", check::failures());
  return check::failures() == 0 ? 0 : 1;
}
