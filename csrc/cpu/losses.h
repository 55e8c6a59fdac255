// Losses and slopes of one layer, which the layers of a call compute side by side.
#pragma once

#include "../op.h"

namespace fdk::cpu {

// `losses` of csrc/op.h for one layer, whose sums begin at `first_channel`; returns its loss.
double losses_of_layer(const Pyramid& pyramid, int64_t layer, int64_t first_channel, const void* sums,
                       const void* masses, const Losses& losses);

} // namespace fdk::cpu
