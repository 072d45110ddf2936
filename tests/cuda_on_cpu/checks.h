// Every kernel's checks; few: the short set for slow builds.
#pragma once

namespace hesskern::cuda::check {

// Processors that the planners see from here on.
void multiprocessor_count_is(int count);

void check_core(bool few);
void check_input_covariance(bool few);
void check_conv_input_covariance(bool few);
void check_conv_few_channels(bool few);
void check_conv_lags(bool few);
void check_output_hessian(bool few);
void check_narrow_rows(bool few);
void check_root_rows(bool few);
void check_block_gram(bool few);
void check_centre_split(bool few);
void check_max_pool(bool few);
void check_mirror(bool few);
void check_squares(bool few);
void check_sampled_cross_entropy(bool few);
void check_products(bool few);
void check_pack_along_k(bool few);
void check_grouped_products(bool few);
void check_kron_matmul(bool few);
void check_layer_hessian_matmul(bool few);
void check_layer_hessian_coefficients(bool few);

}  // namespace hesskern::cuda::check
