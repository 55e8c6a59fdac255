// Stage log_norm on the CPU: O(N C) numbers, one thread, in double.
#include "../log_norm.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "log_norm_features.h"

namespace fdk::cpu {
namespace {

// The pairs (foreground of i, background of j) whose distances one logarithm adds up.
struct Pair {
  int64_t i, j;
};

// One logarithm: its pairs, the samples on which it depends, and the entries (rows) that it is part of.
struct Term {
  Pair pairs[2];
  int num_pairs;
  bool met;
};

Term own_term(const LayerFeatures& x, int64_t n) { return {{{n, n}, {0, 0}}, 1, x.counts[n] != 0}; }

Term shuffled_term(const LayerFeatures& x, int64_t n) {
  const int64_t partner = x.args.pairing[n];
  const bool met = x.counts[n] && x.counts[partner];
  return {{{partner, n}, {0, 0}}, 1, met};
}

Term pooled_term(const LayerFeatures& x, int64_t k) {
  const int64_t i = x.args.pairing[2 * k], j = x.args.pairing[2 * k + 1];
  const bool met = i >= 0 && j >= 0 && x.counts[i] && x.counts[j];
  return {{{i, j}, {j, i}}, 2, met};
}

// (L2)
double distance(const LayerFeatures& x, Pair pair) {
  if (x.args.norm == Norm::kVector) {
    const double *f = x.f.data() + pair.i * x.channels, *b = x.b.data() + pair.j * x.channels;
    double total = 0;
#pragma omp simd reduction(+ : total)
    for (int64_t c = 0; c < x.channels; ++c)
      total += (f[c] - b[c]) * (f[c] - b[c]);
    return total;
  }
  const double difference = x.fg_sum[pair.i] - x.bg_sum[pair.j], sum = x.fg_sum[pair.i] + x.bg_sum[pair.j];
  const double squared = difference * difference;
  return x.args.norm == Norm::kRelative ? squared / (sum * sum + x.args.eps) : squared;
}

double term_distance(const LayerFeatures& x, const Term& term) {
  double total = 0;
  for (int p = 0; p < term.num_pairs; ++p)
    total += distance(x, term.pairs[p]);
  return total;
}

double term_loss(const LayerFeatures& x, const Term& term) {
  return term.met ? -x.args.log_scale * std::log(term_distance(x, term) + x.args.eps) : 0.0;
}

// The terms of the batch norm (L6): own samples, and exchanged ones.
std::vector<Term> batch_terms(const LayerFeatures& x, bool exchanged) {
  std::vector<Term> terms;
  if (!exchanged) {
    for (int64_t n = 0; n < x.args.batch; ++n)
      terms.push_back(own_term(x, n));
  } else if (x.args.exchange == Exchange::kShuffle) {
    for (int64_t n = 0; n < x.args.num_pairs; ++n)
      terms.push_back(shuffled_term(x, n));
  } else if (x.args.exchange == Exchange::kPooled) {
    for (int64_t k = 0; k < x.args.num_pairs; ++k)
      terms.push_back(pooled_term(x, k));
  }
  terms.erase(std::remove_if(terms.begin(), terms.end(), [](const Term& term) { return !term.met; }), terms.end());
  return terms;
}

double batch_distance(const LayerFeatures& x, const std::vector<Term>& terms, int64_t c) {
  double total = 0;
  for (const Term& term : terms) {
    for (int p = 0; p < term.num_pairs; ++p) {
      const double d = x.f[term.pairs[p].i * x.channels + c] - x.b[term.pairs[p].j * x.channels + c];
      total += d * d;
    }
  }
  return total;
}

// The entries of a layer: [N], or [C] over the batch. Returns how many of them count.
int64_t entries_of(const LayerFeatures& x, std::vector<double>& entries) {
  const LogNorm& args = x.args;
  const int64_t counted = std::count(x.counts.begin(), x.counts.end(), 1);
  if (args.norm == Norm::kBatch) {
    entries.assign(x.channels, 0);
    for (const bool exchanged : {false, true}) {
      const std::vector<Term> terms = batch_terms(x, exchanged);
      for (int64_t c = 0; !terms.empty() && c < x.channels; ++c) {
        entries[c] -= args.log_scale * std::log(batch_distance(x, terms, c) + args.eps);
      }
    }
    return counted > 0 ? x.channels : 0;
  }
  entries.assign(args.batch, 0);
  double pooled = 0;
  int64_t met = 0;
  for (int64_t k = 0; args.exchange == Exchange::kPooled && k < args.num_pairs; ++k) {
    const Term term = pooled_term(x, k);
    pooled += term_loss(x, term);
    met += term.met;
  }
  pooled /= static_cast<double>(std::max<int64_t>(met, 1));
  for (int64_t n = 0; n < args.batch; ++n) {
    if (!x.counts[n]) continue;
    entries[n] = term_loss(x, own_term(x, n)) + pooled;
    if (args.exchange == Exchange::kShuffle) entries[n] += term_loss(x, shuffled_term(x, n));
  }
  return counted;
}

int64_t entry_index(const LayerFeatures& x, int64_t entry) {
  return x.args.norm == Norm::kBatch ? x.first_channel + entry : entry * x.args.num_layers + x.layer;
}

// Adds the gradient of q * distance(pair) to grad_f and grad_b [N, C].
void add_pair_gradient(const LayerFeatures& x, Pair pair, double q, double* grad_f, double* grad_b) {
  const double* f = x.f.data() + pair.i * x.channels;
  const double* b = x.b.data() + pair.j * x.channels;
  grad_f += pair.i * x.channels;
  grad_b += pair.j * x.channels;
  if (x.args.norm == Norm::kVector) {
#pragma omp simd
    for (int64_t c = 0; c < x.channels; ++c) {
      const double g = 2 * q * (f[c] - b[c]);
      grad_f[c] += g;
      grad_b[c] -= g;
    }
    return;
  }
  const double difference = x.fg_sum[pair.i] - x.bg_sum[pair.j], sum = x.fg_sum[pair.i] + x.bg_sum[pair.j];
  const bool relative = x.args.norm == Norm::kRelative;
  const double d = relative ? sum * sum + x.args.eps : 1, turn = relative ? difference * sum / d : 0;
  const double g_f = 2 * q * difference / d * (1 - turn), g_b = -2 * q * difference / d * (1 + turn);
  for (int64_t c = 0; c < x.channels; ++c) {
    grad_f[c] += g_f;
    grad_b[c] += g_b;
  }
}

void add_term_gradient(const LayerFeatures& x, const Term& term, double upstream, double* grad_f, double* grad_b) {
  if (!term.met) return;
  const double q = -x.args.log_scale * upstream / (term_distance(x, term) + x.args.eps);
  for (int p = 0; p < term.num_pairs; ++p)
    add_pair_gradient(x, term.pairs[p], q, grad_f, grad_b);
}

void add_batch_gradient(const LayerFeatures& x, const std::vector<double>& upstream, double* grad_f, double* grad_b) {
  for (const bool exchanged : {false, true}) {
    const std::vector<Term> terms = batch_terms(x, exchanged);
    for (int64_t c = 0; !terms.empty() && c < x.channels; ++c) {
      const double q = -x.args.log_scale * upstream[c] / (batch_distance(x, terms, c) + x.args.eps);
      for (const Term& term : terms) {
        for (int p = 0; p < term.num_pairs; ++p) {
          const int64_t i = term.pairs[p].i * x.channels + c, j = term.pairs[p].j * x.channels + c;
          const double g = 2 * q * (x.f[i] - x.b[j]);
          grad_f[i] += g;
          grad_b[j] -= g;
        }
      }
    }
  }
}

void add_sample_gradient(const LayerFeatures& x, const std::vector<double>& upstream, double* grad_f, double* grad_b) {
  const LogNorm& args = x.args;
  double shared = 0;
  for (int64_t n = 0; n < args.batch; ++n) {
    if (!x.counts[n]) continue;
    shared += upstream[n];
    add_term_gradient(x, own_term(x, n), upstream[n], grad_f, grad_b);
    if (args.exchange == Exchange::kShuffle) {
      add_term_gradient(x, shuffled_term(x, n), upstream[n], grad_f, grad_b);
    }
  }
  if (args.exchange != Exchange::kPooled) return;
  int64_t met = 0;
  for (int64_t k = 0; k < args.num_pairs; ++k)
    met += pooled_term(x, k).met;
  shared /= static_cast<double>(std::max<int64_t>(met, 1));
  for (int64_t k = 0; k < args.num_pairs; ++k)
    add_term_gradient(x, pooled_term(x, k), shared, grad_f, grad_b);
}

// (L7) of the sums of one sample; where `masked`, the background's sum is m_fg - s_fg and has no gradient of its own.
template <class T>
void write_sums_gradient(const double* grad_f, const double* grad_b, double w_fg, double w_bg, bool masked,
                         int64_t count, T* fg, T* bg) {
  const double by_fg = 1 / w_fg, by_bg = 1 / w_bg;
  if (masked) {
#pragma omp simd
    for (int64_t c = 0; c < count; ++c) {
      fg[c] = static_cast<T>(grad_f[c] * by_fg - grad_b[c] * by_bg);
      bg[c] = 0;
    }
    return;
  }
#pragma omp simd
  for (int64_t c = 0; c < count; ++c)
    fg[c] = static_cast<T>(grad_f[c] * by_fg);
#pragma omp simd
  for (int64_t c = 0; c < count; ++c)
    bg[c] = static_cast<T>(grad_b[c] * by_bg);
}

double dot(const double* a, const double* b, int64_t count) {
  double total = 0;
#pragma omp simd reduction(+ : total)
  for (int64_t c = 0; c < count; ++c)
    total += a[c] * b[c];
  return total;
}

// (L7). Samples that do not count have rows of 0 and weights of 1.
void write_through_weights(const LayerFeatures& x, const std::vector<double>& grad_f, const std::vector<double>& grad_b,
                           void* grad_sums, void* grad_masses) {
  const LogNorm& args = x.args;
  for (int64_t n = 0; n < args.batch; ++n) {
    const double *f_row = grad_f.data() + n * x.channels, *b_row = grad_b.data() + n * x.channels;
    with_type(args.accumulate, [&](auto zero) {
      using T = decltype(zero);
      T* out = static_cast<T*>(grad_sums);
      write_sums_gradient(f_row, b_row, x.w_fg[n], x.w_bg[n], args.masked_background, x.channels,
                          out + x.sum_index(0, n, 0), out + x.sum_index(1, n, 0));
    });
    if (grad_masses == nullptr) continue;
    const double grad_w_fg = -dot(f_row, x.f.data() + n * x.channels, x.channels) / x.w_fg[n];
    const double grad_w_bg = -dot(b_row, x.b.data() + n * x.channels, x.channels) / x.w_bg[n];
    double g_m_fg = args.masked_background ? total_of(b_row, x.channels) / x.w_bg[n] : 0, g_m_bg = 0;
    if (args.region_weight == RegionWeight::kValid) {
      g_m_fg += grad_w_fg + grad_w_bg;
      g_m_bg = grad_w_fg + grad_w_bg;
    }
    if (args.region_weight == RegionWeight::kRegion) {
      g_m_fg += grad_w_fg;
      g_m_bg = grad_w_bg;
    }
    write(grad_masses, args.accumulate, x.mass_index(0, n), g_m_fg);
    write(grad_masses, args.accumulate, x.mass_index(1, n), g_m_bg);
  }
}

// The loss of one layer from its entries.
double reduced(const LayerFeatures& x, const std::vector<double>& entries, int64_t counted) {
  double total = 0;
  for (const double entry : entries)
    total += entry;
  return x.args.reduction == Reduction::kMean ? total / static_cast<double>(std::max<int64_t>(counted, 1)) : total;
}

// Writes the loss of one layer, or its entries.
void write_loss(const LayerFeatures& x, void* loss) {
  const LogNorm& args = x.args;
  std::vector<double> entries;
  const int64_t counted = entries_of(x, entries);
  if (args.reduction != Reduction::kNone) {
    write(loss, args.accumulate, x.layer, reduced(x, entries, counted));
    return;
  }
  for (size_t e = 0; e < entries.size(); ++e) {
    write(loss, args.accumulate, entry_index(x, static_cast<int64_t>(e)), entries[e]);
  }
}

// Writes the gradients of the sums and, unless null, the masses of one layer: those of its loss times `factor`, and
// times grad_loss unless that is null.
void write_gradients(const LayerFeatures& x, double factor, const void* grad_loss, void* grad_sums, void* grad_masses) {
  const LogNorm& args = x.args;
  const int64_t samples = std::count(x.counts.begin(), x.counts.end(), 1);
  const bool over_batch = args.norm == Norm::kBatch;
  const int64_t num_entries = over_batch ? x.channels : args.batch;
  const int64_t counted = over_batch ? (samples > 0 ? x.channels : 0) : samples;
  const double share = args.reduction == Reduction::kMean ? 1.0 / std::max<int64_t>(counted, 1) : 1.0;
  std::vector<double> upstream(num_entries, share * factor);
  for (int64_t e = 0; grad_loss != nullptr && e < num_entries; ++e) {
    const int64_t at = args.reduction == Reduction::kNone ? entry_index(x, e) : x.layer;
    upstream[e] *= read(grad_loss, args.accumulate, at);
  }
  std::vector<double> grad_f(args.batch * x.channels, 0), grad_b(args.batch * x.channels, 0);
  over_batch ? add_batch_gradient(x, upstream, grad_f.data(), grad_b.data())
             : add_sample_gradient(x, upstream, grad_f.data(), grad_b.data());
  write_through_weights(x, grad_f, grad_b, grad_sums, grad_masses);
}

// Calls body with the region features of each layer.
template <class Body>
void for_each_layer(const LogNorm& args, const void* sums, const void* masses, const Body& body) {
  int64_t first_channel = 0;
  for (int64_t layer = 0; layer < args.num_layers; ++layer) {
    const LayerFeatures x(args, layer, first_channel, sums, masses);
    first_channel += x.channels;
    body(x);
  }
}

} // namespace

void log_norm_forward(const LogNorm& args, const void* sums, const void* masses, void* loss) {
  for_each_layer(args, sums, masses, [&](const LayerFeatures& x) { write_loss(x, loss); });
}

void log_norm_backward(const LogNorm& args, const void* grad_loss, const void* sums, const void* masses,
                       void* grad_sums, void* grad_masses) {
  for_each_layer(args, sums, masses,
                 [&](const LayerFeatures& x) { write_gradients(x, 1, grad_loss, grad_sums, grad_masses); });
}

void log_norm_forward_with_slopes(const LogNorm& args, const void* sums, const void* masses, double share, void* loss,
                                  void* slopes) {
  const bool is_one = share != 0;
  double sum = 0;
  for_each_layer(args, sums, masses, [&](const LayerFeatures& x) {
    std::vector<double> entries;
    const int64_t counted = entries_of(x, entries);
    const double of_layer = reduced(x, entries, counted);
    sum += of_layer;
    if (!is_one) write(loss, args.accumulate, x.layer, of_layer);
    if (slopes != nullptr) write_gradients(x, is_one ? share : 1, nullptr, slopes, nullptr);
  });
  if (is_one) write(loss, args.accumulate, 0, share * sum);
}

} // namespace fdk::cpu
