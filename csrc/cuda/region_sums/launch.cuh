// What other stages launch of region_sums, whose kernels are compiled once, in region_sums.cu.
#pragma once

#include "work.cuh"

namespace fdk::cuda {

// The first pass of forward: partial sums, or final ones where a layer has one tile.
template <typename Acc>
void launch_forward(const Work& work, const Outputs<Acc>& out, void* stream);

template <typename Acc>
void launch_backward(const Pyramid& pyramid, const SumGradients<Acc>& grad_sums, void* stream);

} // namespace fdk::cuda
