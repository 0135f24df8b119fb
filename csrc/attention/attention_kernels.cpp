// Attention on the CPU, compiled once per CPU level: FlashAttention-2's forward (arXiv 2307.08691, algorithm 1) in fp32.

#include "attention/attention_decode.h"
#include "attention/attention_prefill.h"

namespace fastgpt::FASTGPT_CPU_LEVEL {

int64_t attention_workspace(int64_t D, int64_t D_v, int64_t group) {
  return larger(prefill_workspace(D, D_v, group), decode_workspace(D, D_v));
}

void attention_forward(const AttentionForward& args, int64_t begin, int64_t end, float* workspace) {
  if (args.few_queries(args.T)) return run_decode_tasks(args, begin, end, workspace);
  const int64_t groups = args.groups();
  for (int64_t task = begin; task < end; ++task) {
    const int64_t head = task / groups, b = head / args.H_kv, h_kv = head % args.H_kv;
    // Alternates between both ends, to balance the load: with a causal mask, late queries see more keys than early ones.
    const int64_t index = task % groups, group = index % 2 ? groups - 1 - index / 2 : index / 2;
    const int64_t first = group * args.group, count = smaller(args.blocks() - first, args.group);
    // A short packed sequence gets the same bits as it would alone.
    if (args.few_queries(sequence_of(args, b).queries)) {
      if (first == 0) run_decode(args, b, h_kv, 1, 0, workspace);
    } else {
      run_prefill(args, b, h_kv, first, count, workspace);
    }
  }
}

void attention_forward_join(const AttentionForward& args, int64_t begin, int64_t end, float* workspace) {
  for (int64_t head = begin; head < end; ++head) {
    for (int64_t token = 0; token < args.T; ++token) {
      Arena parts(workspace);
      const DecodeShared shared(args.D, args.D_v, parts);
      DecodeBlock(args, head / args.H_kv, head % args.H_kv, token, 0, shared, parts).join();
    }
  }
}

}  // namespace fastgpt::FASTGPT_CPU_LEVEL
