// cross_entropy_rows's parameters.
#pragma once

#include <cstdint>

#include "common.h"

namespace lk {

// Cross entropy of rows of logits: z = logit_scale · logits, then softcap · tanh(z / softcap) where softcap is not 0.
// losses[m] = log Σ exp(z) - (1 - label_smoothing) · z[label] - label_smoothing · the mean of z; 0 where the label is
// ignore_index, NaN where it is outside of the columns.
struct CrossEntropyParams {
  float* logits;  // [rows, columns], rows `stride` apart
  int64_t stride;
  const int64_t* labels;     // [rows]
  const float* grad_losses;  // [rows]; null: no gradient is wanted, and the logits may become anything
  float* losses;             // [rows]
  int64_t rows, columns;
  int64_t ignore_index;
  float label_smoothing, softcap, logit_scale;
  FloatType grad_type;  // of the gradient of the logits, whose rows begin where those of the logits do
};

}  // namespace lk
