// build_plan on the CPU: near linear in rows and keys, one pass after the other over int32 arrays. The meaning is the
// torch path in maskops/lowering.py, maskops/layouts.py and maskops/spans.py; both give the same integers.
//   plan_program.cpp  parse_plan, check_plan: text to program, operands against the program
//   plan_spans.cpp    write_spans: layouts to the sequence of each row, bounds to the spans of each row
//   plan_tiles.cpp    write_tiles: spans to the work list and its transpose; of the layouts it knows only the holes
#include "plan.h"

namespace maskops {

void build_plan(const PlanRequest& request, const PlanResult& result) {
  write_spans(request, result);
  write_tiles(request, result);
}

}  // namespace maskops
