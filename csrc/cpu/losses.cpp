// Losses and their slopes on the CPU: O(N C) numbers of a layer, on one thread, in double.
#include <algorithm>
#include <cmath>
#include <vector>

#include "losses.h"
#include "region_features.h"

namespace fdk::cpu {
namespace {

// The foreground of sample i against the background of sample j.
struct Pair {
  int64_t i, j;
};

// One logarithm: its argument adds up the distances of the pairs.
struct Term {
  Pair pairs[2];
  int num_pairs;
  bool valid;      // all of its samples count
  double distance; // of a valid term; 0 under the norm over the batch, which has one for each channel
};

// The logarithms of a layer, made once for its loss and its slopes.
struct Terms {
  std::vector<Term> own;       // [N]
  std::vector<Term> exchanged; // shuffle [N], pooled [K], else empty
};

Term own_term(const RegionFeatures& x, int64_t n) { return {{{n, n}, {0, 0}}, 1, x.counts[n] != 0, 0}; }

Term shuffled_term(const RegionFeatures& x, int64_t n) {
  const int64_t partner = x.call.pairing[n];
  const bool valid = x.counts[n] && x.counts[partner];
  return {{{partner, n}, {0, 0}}, 1, valid, 0};
}

Term pooled_term(const RegionFeatures& x, int64_t k) {
  const int64_t i = x.call.pairing[2 * k], j = x.call.pairing[2 * k + 1];
  const bool valid = i >= 0 && j >= 0 && x.counts[i] && x.counts[j];
  return {{{i, j}, {j, i}}, 2, valid, 0};
}

// (L2)
double distance(const RegionFeatures& x, Pair pair) {
  if (x.options.norm == Norm::kVector) {
    const double *f = x.f.get() + pair.i * x.channels, *b = x.b.get() + pair.j * x.channels;
    return loss_row_kernels().squared_distance(f, b, x.channels);
  }
  const double difference = x.fg_sum[pair.i] - x.bg_sum[pair.j], sum = x.fg_sum[pair.i] + x.bg_sum[pair.j];
  const double squared = difference * difference;
  return x.options.norm == Norm::kRelative ? squared / (sum * sum + x.options.eps) : squared;
}

Terms terms_of(const RegionFeatures& x) {
  Terms terms;
  for (int64_t n = 0; n < x.pyramid.batch; ++n)
    terms.own.push_back(own_term(x, n));
  for (int64_t k = 0; x.options.exchange != Exchange::kNone && k < x.call.num_pairs; ++k)
    terms.exchanged.push_back(x.options.exchange == Exchange::kShuffle ? shuffled_term(x, k) : pooled_term(x, k));
  if (x.options.norm == Norm::kBatch) return terms;
  for (std::vector<Term>* all : {&terms.own, &terms.exchanged}) {
    for (Term& term : *all) {
      for (int p = 0; term.valid && p < term.num_pairs; ++p)
        term.distance += distance(x, term.pairs[p]);
    }
  }
  return terms;
}

double term_loss(const RegionFeatures& x, const Term& term) {
  return term.valid ? -x.options.log_scale * std::log(term.distance + x.options.eps) : 0.0;
}

int64_t count_valid(const std::vector<Term>& terms) {
  return std::count_if(terms.begin(), terms.end(), [](const Term& term) { return term.valid; });
}

// The distance of one channel under the norm over the batch (L6).
double batch_distance(const RegionFeatures& x, const std::vector<Term>& terms, int64_t c) {
  double total = 0;
  for (const Term& term : terms) {
    for (int p = 0; term.valid && p < term.num_pairs; ++p) {
      const double d = x.f[term.pairs[p].i * x.channels + c] - x.b[term.pairs[p].j * x.channels + c];
      total += d * d;
    }
  }
  return total;
}

// The number of entries of the layer that count.
int64_t count_entries(const RegionFeatures& x) {
  const int64_t samples = std::count(x.counts.begin(), x.counts.end(), 1);
  return x.options.norm == Norm::kBatch ? (samples > 0 ? x.channels : 0) : samples;
}

// Computes the entries of the layer: [N], or [C] over the batch.
std::vector<double> entries_of(const RegionFeatures& x, const Terms& terms) {
  if (x.options.norm == Norm::kBatch) {
    std::vector<double> entries(x.channels, 0);
    for (const std::vector<Term>* all : {&terms.own, &terms.exchanged}) {
      if (count_valid(*all) == 0) continue;
      for (int64_t c = 0; c < x.channels; ++c) {
        entries[c] -= x.options.log_scale * std::log(batch_distance(x, *all, c) + x.options.eps);
      }
    }
    return entries;
  }
  std::vector<double> entries(x.pyramid.batch, 0);
  double pooled = 0;
  if (x.options.exchange == Exchange::kPooled) {
    for (const Term& term : terms.exchanged)
      pooled += term_loss(x, term);
    pooled /= static_cast<double>(std::max<int64_t>(count_valid(terms.exchanged), 1));
  }
  for (int64_t n = 0; n < x.pyramid.batch; ++n) {
    if (!x.counts[n]) continue;
    entries[n] = term_loss(x, terms.own[n]) + pooled;
    if (x.options.exchange == Exchange::kShuffle) entries[n] += term_loss(x, terms.exchanged[n]);
  }
  return entries;
}

double loss_of(const RegionFeatures& x, const Terms& terms) {
  double total = 0;
  for (const double entry : entries_of(x, terms))
    total += entry;
  return x.options.reduction == Reduction::kMean ? total / static_cast<double>(std::max<int64_t>(count_entries(x), 1))
                                                 : total;
}

// Adds the gradient of q * distance(pair) to grad_f and grad_b [N, C].
void add_pair_gradient(const RegionFeatures& x, Pair pair, double q, double* grad_f, double* grad_b) {
  const double *f = x.f.get() + pair.i * x.channels, *b = x.b.get() + pair.j * x.channels;
  grad_f += pair.i * x.channels;
  grad_b += pair.j * x.channels;
  if (x.options.norm == Norm::kVector) {
    return loss_row_kernels().add_distance_gradient(f, b, q, x.channels, grad_f, grad_b);
  }
  const double difference = x.fg_sum[pair.i] - x.bg_sum[pair.j], sum = x.fg_sum[pair.i] + x.bg_sum[pair.j];
  const bool relative = x.options.norm == Norm::kRelative;
  const double d = relative ? sum * sum + x.options.eps : 1, ratio = relative ? difference * sum / d : 0;
  const double g_f = 2 * q * difference / d * (1 - ratio), g_b = -2 * q * difference / d * (1 + ratio);
  for (int64_t c = 0; c < x.channels; ++c) {
    grad_f[c] += g_f;
    grad_b[c] += g_b;
  }
}

// Adds the gradient of `weight` times the term.
void add_term_gradient(const RegionFeatures& x, const Term& term, double weight, double* grad_f, double* grad_b) {
  if (!term.valid) return;
  const double q = -x.options.log_scale * weight / (term.distance + x.options.eps);
  for (int p = 0; p < term.num_pairs; ++p)
    add_pair_gradient(x, term.pairs[p], q, grad_f, grad_b);
}

// Adds the gradient of the sum of the entries times `weight`, under the norm over the batch.
void add_batch_gradient(const RegionFeatures& x, const Terms& terms, double weight, double* grad_f, double* grad_b) {
  for (const std::vector<Term>* all : {&terms.own, &terms.exchanged}) {
    if (count_valid(*all) == 0) continue;
    for (int64_t c = 0; c < x.channels; ++c) {
      const double q = -x.options.log_scale * weight / (batch_distance(x, *all, c) + x.options.eps);
      for (const Term& term : *all) {
        for (int p = 0; term.valid && p < term.num_pairs; ++p) {
          const int64_t i = term.pairs[p].i * x.channels + c, j = term.pairs[p].j * x.channels + c;
          const double g = 2 * q * (x.f[i] - x.b[j]);
          grad_f[i] += g;
          grad_b[j] -= g;
        }
      }
    }
  }
}

// The same under the other norms.
void add_sample_gradient(const RegionFeatures& x, const Terms& terms, double weight, double* grad_f, double* grad_b) {
  double total = 0;
  for (int64_t n = 0; n < x.pyramid.batch; ++n) {
    if (!x.counts[n]) continue;
    total += weight;
    add_term_gradient(x, terms.own[n], weight, grad_f, grad_b);
    if (x.options.exchange == Exchange::kShuffle) add_term_gradient(x, terms.exchanged[n], weight, grad_f, grad_b);
  }
  if (x.options.exchange != Exchange::kPooled) return;
  total /= static_cast<double>(std::max<int64_t>(count_valid(terms.exchanged), 1));
  for (const Term& term : terms.exchanged)
    add_term_gradient(x, term, total, grad_f, grad_b);
}

// Writes the slopes (F1) of one layer.
void write_slopes(const RegionFeatures& x, const Terms& terms, void* slopes) {
  const int64_t N = x.pyramid.batch;
  const bool is_mean = x.options.reduction == Reduction::kMean;
  const double weight = is_mean ? 1.0 / std::max<int64_t>(count_entries(x), 1) : 1.0;
  std::vector<double> grad_f(N * x.channels, 0), grad_b(N * x.channels, 0);
  x.options.norm == Norm::kBatch ? add_batch_gradient(x, terms, weight, grad_f.data(), grad_b.data())
                                 : add_sample_gradient(x, terms, weight, grad_f.data(), grad_b.data());
  char* out = static_cast<char*>(slopes);
  for (int64_t n = 0; n < N; ++n) {
    const int64_t first = n * x.channels;
    loss_row_kernels().divide_gradients(x.pyramid.accumulate, grad_f.data() + first, grad_b.data() + first,
                                        x.divisors[n], x.channels, out + x.byte_of_row(0, n),
                                        out + x.byte_of_row(1, n));
  }
}

} // namespace

double losses_of_layer(const Pyramid& pyramid, int64_t layer, int64_t first_channel, const void* sums,
                       const void* masses, const Losses& losses) {
  const RegionFeatures x(pyramid, losses, layer, first_channel, sums, masses);
  const Terms terms = terms_of(x);
  const double loss = loss_of(x, terms);
  if (losses.losses != nullptr) write(losses.losses, pyramid.accumulate, layer, loss);
  if (losses.slopes != nullptr) write_slopes(x, terms, losses.slopes);
  return loss;
}

void losses(const Pyramid& pyramid, const void* sums, const void* masses, const Losses& losses) {
  int64_t first_channel = 0;
  for (int64_t layer = 0; layer < pyramid.num_layers; ++layer) {
    losses_of_layer(pyramid, layer, first_channel, sums, masses, losses);
    first_channel += pyramid.layers[layer].channels;
  }
}

} // namespace fdk::cpu
