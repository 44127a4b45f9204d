// Products of matrices in float32: what ops/matmul.cpp calls.
#pragma once

#include <cstdint>

#include "../element.h"
#include "threads.h"

namespace maskops {

// A matrix in memory; strides in elements, of any size.
struct Matrix {
  const void* data;
  Element element;
  int64_t row_stride;
  int64_t column_stride;
};

// result = start + left @ right, in float32.
struct Matmul {
  Matrix left;   // rows x depth
  Matrix right;  // depth x columns
  // rows x columns; nullptr: zeros. It may be the result; stride 0 where one row serves them all.
  const float* start;
  int64_t start_stride;
  float* result;  // rows x columns, contiguous columns
  int64_t result_stride;
  int64_t rows;
  int64_t columns;
  int64_t depth;
};

// A part of a packed operand: panels [panel_begin, panel_end) of rows of the left or columns of the right operand that
// start at `origin`, over the depth [depth_begin, depth_end). Panel i starts at packed + i * panel_stride and holds
// all that it has of one step of the depth side by side.
struct MatmulPanels {
  int64_t origin;
  int64_t panel_begin, panel_end;
  int64_t slab_begin;  // the depth at which panels start
  int64_t depth_begin, depth_end;
  float* packed;
  int64_t panel_stride;
};

// A block of the result: these panels of the left operand times those of the right one.
struct MatmulBlock {
  const MatmulPanels* left;
  const MatmulPanels* right;
  int64_t left_begin, left_end, right_begin, right_end;  // panels
};

void matmul(const Matmul& p, const Threads& threads);

}  // namespace maskops
