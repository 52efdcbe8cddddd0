// The kernels of one instruction set as the operators call them.

#pragma once

#include "attention_backward.h"
#include "attention_forward.h"
#include "attention_map.h"

namespace {

constexpr Kernels this_instruction_set() {
  return {[](const Problem& p) { return Workspace(p, nullptr).total; },
          [](const Problem& p) { return round_up(p.head_dim, kLanes); },
          forward_row,
          write_delta,
          backward_row,
          backward_column,
          store_dq,
          map_workspace_floats,
          map_softmax,
          map_tile};
}

}  // namespace
