# What made the files here, in bfloat16, on one core each of an Intel Xeon with AVX-512 and AMX, two commands at a
# time. Minutes are those of this machine. pip install transformers; then, from the root: bash results/smollm2/commands.sh
set -e
export OMP_NUM_THREADS=1 SMOLLM2=HuggingFaceTB/SmolLM2-135M-Instruct
O=out/smollm2
mkdir -p $O

# The student before training: 20 of the 30 layers. Without layers 14 to 23 the loss is least (7.5; of the whole, 2.7).
python - <<'END'
import os
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
name, kept = os.environ["SMOLLM2"], [*range(14), *range(24, 30)]
model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
model.model.layers = torch.nn.ModuleList(model.model.layers[i] for i in kept)
model.config.num_hidden_layers = len(kept)
model.save_pretrained("out/smollm2/cut")
AutoTokenizer.from_pretrained(name).save_pretrained("out/smollm2/cut")
END

few="--max_prompt_tokens=64 --max_tokens=128"
to="--batch_size=16 --micro_batch=4"
python teacher.py --model=$SMOLLM2 --data=dolly $few $to --lr=1e-4 --updates=150 --evals=3 --out=$O/teacher
python teacher.py --model=$O/cut --data=dolly $few $to --lr=5e-4 --updates=450 --evals=3 --select=loss --out=$O/init

# SeqKD: the teacher's answers to 2,400 prompts
python - <<'END'
from pathlib import Path
import data
from safe.files import write_lines
tokenizer = data.load_tokenizer("out/smollm2/teacher")
rows = data.load_examples("dolly", "train", tokenizer, 64, 128, print)
rows = [rows[i].row for i in data.picks(0, 2400, len(rows), 10)]
write_lines(Path("out/smollm2/rows.jsonl"),
            [{"instruction": row.instruction, "input": row.input, "output": row.outputs[0]} for row in rows])
END
python sample.py --model=$O/teacher --data=$O/rows.jsonl --seed=10 --max_prompt_tokens=64 --max_response_tokens=64 \
    --out=$O/answers.jsonl

# The baselines: 8 to 15 minutes each
to="$to --updates=120 --evals=1 --select=last"
python teacher.py --model=$O/init --data=dolly $few $to --lr=3e-5 --out=$O/sft-3e-5
python teacher.py --model=$O/init --data=dolly $few $to --lr=1e-4 --out=$O/sft-1e-4
for lr in 3e-5 1e-4 3e-4; do
    python teacher.py --model=$O/init --data=dolly $few $to --lr=$lr --teacher=$O/teacher --out=$O/kd-$lr
done
python teacher.py --model=$O/init --data=$O/answers.jsonl --valid_data=dolly $few $to --lr=1e-4 --out=$O/seqkd-1e-4

# Phase 2: 22 minutes each. These ran without the evaluation of the test prompts that distill.py ends with, which is below,
# and the validation before the first update, the same for all, was made once.
to="--data=dolly $few --finetune=none --baselines= --teacher=$O/teacher --student=$O/init --pt_coef=0 --rollouts=64
    --minibatch=16 --inner_epochs=2 --steps=120 --eval_every=1000 --select=last --micro_batch=4 --sample_batch=32"
for lr in 3e-5 1e-4 3e-4; do
    python distill.py $to --lr=$lr --out=$O/minillm-$lr
done
python distill.py $to --lr=1e-4 --objective=single --mix_alpha=0 --weight=none --out=$O/gkd-1e-4

# The test: 490 prompts of DollyEval, answers of at most 64 tokens; Rouge-L of five seeds, and KL of the first. These
# ran with the draws of each model and seed kept, which changes no figure: the teacher's are the same for all.
mkdir -p $O/chosen
link() { ln -sfn ../$2 $O/chosen/$1; }
link init init; link sft sft-3e-5; link kd kd-1e-4; link seqkd seqkd-1e-4
link gkd gkd-1e-4/minillm; link minillm minillm-1e-4/minillm
to="--data=dolly --max_response_tokens=64"
for name in init sft kd seqkd gkd minillm; do  # 9 and 5 minutes each
    python eval.py --model=$O/chosen/$name $to --out=$O/test/$name
    python eval.py --model=$O/chosen/$name $to --seeds=1 --teacher=$O/teacher --out=$O/kl/$name
done
python eval.py --model=$O/teacher $to --seeds=1 --out=$O/test-teacher
python eval.py --model=$O/teacher --data=dolly --max_response_tokens=128 --out=$O/test-teacher-128
python -m measure.report $O/test --out=$O/report
python -m measure.report $O/kl --out=$O/report-kl
