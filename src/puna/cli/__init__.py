"""The command line: parse, call, print.

main.py      arguments, errors and exit codes      train.py    raise, pretrain, midtrain, sft
settings.py  recipes and `--a.b.c value`           talk.py     generate, chat, serve
show.py      tables and summaries                  tools.py    convert, report, recipe, data, tokenizer
"""
