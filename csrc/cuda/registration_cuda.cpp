#include <torch/csrc/stable/library.h>

#include "operators.h"
#include "python_module.h"

STABLE_TORCH_LIBRARY_IMPL(vitfast_C, CUDA, m) {
    m.impl("layer_norm_forward", TORCH_BOX(&vitfast::cuda::layer_norm_forward));
    m.impl("layer_norm_apply", TORCH_BOX(&vitfast::cuda::layer_norm_apply));
    m.impl("layer_norm_backward", TORCH_BOX(&vitfast::cuda::layer_norm_backward));
    m.impl("scale_add_forward", TORCH_BOX(&vitfast::cuda::scale_add_forward));
    m.impl("activation_forward", TORCH_BOX(&vitfast::cuda::activation_forward));
    m.impl("activation_backward", TORCH_BOX(&vitfast::cuda::activation_backward));
    m.impl("patchify", TORCH_BOX(&vitfast::cuda::patchify));
    m.impl("unpatchify", TORCH_BOX(&vitfast::cuda::unpatchify));
    m.impl("assemble_tokens", TORCH_BOX(&vitfast::cuda::assemble_tokens));
}

VITFAST_PYTHON_MODULE(_C_cuda)
