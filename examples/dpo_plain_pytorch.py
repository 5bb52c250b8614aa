"""DPO (arXiv 2305.18290) over shared prompts in plain PyTorch: no trainer, one mask.

    python examples/dpo_plain_pytorch.py --model demo --steps 20

Every batch becomes a prefix tree, so a prompt is computed once for both of its answers.
"""

import argparse
import copy

import torch
import torch.nn.functional as F

from longshadow import PrefixTree, prefix_mask
from longshadow.models import load_model

PROMPT = "<|im_start|>user\nName a {colour} thing.<|im_end|>\n<|im_start|>assistant\n"
THINGS = {"red": "A ripe tomato.", "green": "A blade of grass.", "blue": "The sky at noon.", "white": "Fresh snow."}


def preference_rows(tokenizer):
    """Chosen answers, then rejected ones (those to the next question); and each row's prompt length."""
    prompts = [tokenizer(PROMPT.format(colour=colour)).input_ids for colour in THINGS]
    answers = [tokenizer(thing + "<|im_end|>").input_ids for thing in THINGS.values()]
    rows = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
    rows += [prompt + answer for prompt, answer in zip(prompts, answers[1:] + answers[:1], strict=True)]
    return rows, [len(prompt) for prompt in prompts] * 2


def padded(rows):
    """input_ids and attention_mask [N, L]."""
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
    lengths = torch.tensor([len(row) for row in rows])
    return ids, (torch.arange(ids.shape[1]) < lengths[:, None]).long()


def answer_logps(model, tree, ids, is_answer):
    """log p(answer | prompt) of each row, from one forward over the tree's nodes."""
    output = model(
        input_ids=tree.token_ids[None],
        position_ids=tree.positions[None],
        attention_mask=prefix_mask(tree),
        use_cache=False,
    )
    logps = output.logits[0].log_softmax(-1)  # of the token after each node
    return (logps[tree.node_of[:, :-1], ids[:, 1:]] * is_answer).sum(1)


def train(model, tokenizer, steps, learning_rate=1e-5, beta=0.1):
    """Prints and returns the loss of each step."""
    reference = copy.deepcopy(model).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
    rows, prompt_lengths = preference_rows(tokenizer)
    ids, mask = padded(rows)
    tree = PrefixTree.from_batch(ids, mask)
    answered = torch.arange(1, ids.shape[1]) >= torch.tensor(prompt_lengths)[:, None]
    is_answer = answered & mask[:, 1:].bool()
    print(f"{ids.numel()} tokens in the padded batch, {tree.num_tokens} in the tree")
    losses = []
    for step in range(steps):
        with torch.no_grad():
            reference_logps = answer_logps(reference, tree, ids, is_answer)
        chosen, rejected = (answer_logps(model, tree, ids, is_answer) - reference_logps).chunk(2)
        loss = -F.logsigmoid(beta * (chosen - rejected)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        print(f"step {step + 1}: loss {losses[-1]:.4f}")
    return losses


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo", help="hub id, folder, or demo (SmolLM2-135M-Instruct)")
    parser.add_argument("--steps", type=int, default=20)
    arguments = parser.parse_args()
    loaded = load_model(arguments.model, dtype=torch.float32, device="cpu")
    loaded.model.set_attn_implementation("sdpa")
    train(loaded.model, loaded.tokenizer, arguments.steps)
