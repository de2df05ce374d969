// The decoding loop of docs/loop.md: greedy, one request, over any engine.
#pragma once

#include <algorithm>
#include <stdexcept>
#include <string>

#include "engine.hpp"

namespace cllm {

enum class Method { autoregressive, jacobi, jacobi_block };
enum class Proposer { pad, repeat };

struct Request {
    Tokens prompt_ids;
    Method method = Method::jacobi;
    Proposer proposer = Proposer::pad;
    std::int64_t block_size = 16;
    std::int64_t max_new_tokens = 128;
    Tokens eos_token_ids;
    Token pad_token_id = 0;
};

struct Generation {
    Tokens token_ids;
    std::string finish_reason;  // "eos" or "length"
};

// The graph computes this in its output num_accepted. An engine without that output computes it so.
inline std::int64_t count_accepted(const Tokens& block, const Tokens& next_ids) {
    std::size_t row = 0;
    while (row + 1 < block.size() && block[row + 1] == next_ids[row]) ++row;
    return static_cast<std::int64_t>(row) + 1;
}

class Loop {
public:
    Loop(Engine& engine, const Request& request) : engine_(engine), request_(request) {
        if (request.prompt_ids.empty()) throw std::invalid_argument("the prompt has no token");
        if (request.block_size < 1) throw std::invalid_argument("block_size must be at least 1");
    }

    Generation run() {
        prefill();
        fill({request_.prompt_ids.back()});
        while (result_.finish_reason.empty()) step();
        return result_;
    }

private:
    void prefill() {  // the prompt without its last token
        const auto last = request_.prompt_ids.end() - 1;
        for (auto start = request_.prompt_ids.begin(); start != last;) {
            const auto stop = start + std::min<std::ptrdiff_t>(engine_.prefill_chunk(), last - start);
            const Batch batch{Tokens(start, stop), stop - start, write_index_};
            check_rows(batch);
            engine_.prefill(batch);
            write_index_ += stop - start;
            start = stop;
        }
    }

    void step() {  // one forward: verify the block, keep what is right, make the next block
        if (request_.max_new_tokens == static_cast<std::int64_t>(result_.token_ids.size())) {
            result_.finish_reason = "length";
            return;
        }
        const Batch batch{block_, 1, write_index_};
        check_rows(batch);
        const Forward forward = engine_.decode(batch);
        const Tokens& next = forward.next_ids;
        const auto n = static_cast<std::int64_t>(block_.size());
        const std::int64_t a = forward.num_accepted;
        if (a < 1 || a > n || static_cast<std::int64_t>(next.size()) != n)
            throw std::runtime_error("the engine gave " + std::to_string(a) + " accepted tokens for a block of " +
                                     std::to_string(n));

        if (request_.method == Method::autoregressive) {  // keep one token, whatever the draft was
            commit(next, 0, 1);
            write_index_ += 1;
            fill({next[0]});
        } else if (request_.method == Method::jacobi) {  // slide: the block begins at the first token that is not right
            commit(next, 0, a);
            write_index_ += a;
            fill(Tokens(next.begin() + a - 1, next.end()));
        } else if (a == n) {  // the block is at its fixed point: begin the next one
            commit(next, known_, a);
            write_index_ += n;
            known_ = 0;
            fill({next[n - 1]});
        } else {  // iterate the same block: its rows are written again
            commit(next, known_, a);
            known_ = a;
            std::copy(next.begin(), next.end() - 1, block_.begin() + 1);
        }
    }

    void commit(const Tokens& next, std::int64_t first, std::int64_t stop) {  // cut to the limit, then after an eos
        for (std::int64_t row = first; row < stop && result_.finish_reason.empty(); ++row) {
            result_.token_ids.push_back(next[row]);
            const auto& eos = request_.eos_token_ids;
            if (std::find(eos.begin(), eos.end(), next[row]) != eos.end())
                result_.finish_reason = "eos";
            else if (static_cast<std::int64_t>(result_.token_ids.size()) == request_.max_new_tokens)
                result_.finish_reason = "length";
        }
    }

    void fill(Tokens known) {  // the block: what is known or predicted, then proposed tokens
        const Token token = request_.proposer == Proposer::pad ? request_.pad_token_id : known.back();
        known.resize(static_cast<std::size_t>(request_.block_size), token);
        block_ = std::move(known);
    }

    void check_rows(const Batch& batch) const {  // engines ignore a write outside the cache, without an error
        const auto end = batch.write_index + static_cast<std::int64_t>(batch.input_ids.size());
        if (end > engine_.kv_rows())
            throw std::runtime_error("the forward would write " + std::to_string(end) + " KV rows, and the cache has " +
                                     std::to_string(engine_.kv_rows()));
    }

    Engine& engine_;
    const Request& request_;
    Tokens block_;
    std::int64_t write_index_ = 0;
    std::int64_t known_ = 0;  // jacobi-block: tokens of the block that were committed already
    Generation result_;
};

}  // namespace cllm
