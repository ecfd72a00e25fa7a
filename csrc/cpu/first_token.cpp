#include "first_token.h"

#include <torch/csrc/stable/ops.h>

#include "attention.h"
#include "scratch.h"

#define VITFAST_KERNEL "first_token_kernel.h"
#include "for_each_isa.h"

namespace vitfast {

template <class Y>
void first_token_attention(const FirstToken<Y>& args) {
    torch::stable::parallel_for(0, args.images * args.heads, 1, [&](int64_t begin, int64_t end) {
        Scratch scratch(args.length);
        float* const weights = scratch.take<float>(args.length);
        for (int64_t i = begin; i < end; ++i) {
            VITFAST_DISPATCH(first_token_head(args, i / args.heads, i % args.heads, weights));
        }
    });
}

template void first_token_attention(const FirstToken<float>& args);
template void first_token_attention(const FirstToken<bf16>& args);

}  // namespace vitfast
