// One call: tokens sorted by expert, cut into jobs, multiplied wave after wave on all threads.

#pragma once

#include "kernels.h"

struct Call {
  const Kernels *kernels;
  int threads;
  const Matrix *gate_up;  // null: only `down` is applied
  const Matrix *down;
  int32_t activation;
  Tokens x;
  const Routes *routes;   // null: every token goes to matrix 0 with weight 1
  const void *base;       // null, or what the results are added to; as the output
  void *out;              // (tokens, rows of down), of the tokens' dtype
};

Status forward(const Call &call);
