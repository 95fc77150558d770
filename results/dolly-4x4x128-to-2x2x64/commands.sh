# What made the files here, on two cores of an AMD EPYC (a cloud machine that did other work besides), in bfloat16.
# openstax.txt: 5.5 million tokens of OpenStax textbooks. Models from nothing, so they speak badly; see README.md.
# The commands have today's names. Flags that are gone since: --valid_limit (20 for the two bases, else 100), so that
# validation takes longer today; log_every; and distill.py's warmup_steps=20, which is 15 for 480 updates today.
set -e
python teacher.py --model=4x4x128 --data=openstax.txt --updates=600 --evals=3 --batch_size=8 --lr=2e-3 --out=out/base-teacher  # 14 min
python teacher.py --model=2x2x64 --data=openstax.txt --updates=300 --evals=2 --batch_size=8 --lr=3e-3 --out=out/base-student  # 6 min
python teacher.py --model=out/base-teacher --data=dolly --updates=500 --evals=2 --lr=1e-3 --out=out/teacher  # 14 min
python teacher.py --model=out/base-student --data=dolly --updates=300 --evals=3 --select=loss --lr=2e-3 --out=out/init  # 5 min
python distill.py --teacher=out/teacher --student=out/init --corpus=openstax.txt --steps=480 --minibatch=16 --rollouts=64 --lr=3e-4 --eval_every=96 --select=last --out=out/real  # 49 min, 18 of them the final evaluation

# evaluation.md and exposure.png: the other sets, exposure bias and BoolQ, in about 15 minutes; val.jsonl is SuperGLUE's
for model in teacher init minillm; do  # links to the three folders, in out/
    python eval.py --model=out/$model --data=dolly,self-inst,vicuna,sinst --seeds=2 --limit=250 --out=out/eval/$model
    python -m measure.calibration --model=out/$model --data=val.jsonl --limit=1000 --out=out/calibration/$model
done
for model in init minillm; do
    python -m measure.exposure --model=out/$model --teacher=out/teacher --data=dolly --samples=4 --limit=100 --out=out/exposure/$model
done
python -m measure.report out/eval out/exposure out/calibration --out=out/report
