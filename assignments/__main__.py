"""python -m assignments list | cut | grade | check | gradescope; see the package."""

import csv
import sys
from pathlib import Path

from assignments.grading import grade, write_gradescope, write_junit
from assignments.tasks import ROOT, TASKS, copy_project, cut
from plumbing.flags import Parser


def parse_args(argv=None):
    parser = Parser("assignments", description="A course cut from the code.")
    commands = parser.add_subparsers(dest="command", required=True,
                                     parser_class=lambda prog, **how: Parser(prog, **how))
    choices = [*TASKS, "all"]
    commands.add_parser("list", help="the tasks, and what they cut")
    add = commands.add_parser("cut", help="a copy of the project in which tasks are open")
    add.add_argument("tasks", nargs="+", choices=choices, metavar="TASK")
    add.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new folder")
    add = commands.add_parser("grade", help="run the tests of a task on one or more folders")
    add.add_argument("task", choices=choices, metavar="TASK")
    add.add_argument("folders", nargs="*", type=Path, default=[Path(".")], metavar="DIR",
                     help="what students have written (default: here)")
    add.add_argument("--seed", type=int, default=0, metavar="S", help="of the inputs (default: 0)")
    add.add_argument("--gradescope", type=Path, metavar="FILE", help="results.json of the (only) folder")
    add.add_argument("--junit", type=Path, metavar="FILE", help="XML of the (only) folder")
    add.add_argument("--csv", type=Path, metavar="FILE", help="points of every folder and task")
    add = commands.add_parser("gradescope", help="the files of a Gradescope autograder")
    add.add_argument("tasks", nargs="+", choices=choices, metavar="TASK")
    add.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new folder")
    add = commands.add_parser("check", help="prove that tests, cuts and wrong solutions do what they should")
    add.add_argument("tasks", nargs="*", choices=choices, default="all", metavar="TASK", help="default: all")
    return parser.parse_args(argv)


def listed(tasks):
    return [*TASKS] if "all" in tasks else list(dict.fromkeys(tasks))


def files(task):
    return ", ".join(dict.fromkeys(TASKS[name].file for name in listed([task])))


def show_tasks():
    for name, task in TASKS.items():
        print(f"{name}  {task.title:34s} {task.minutes:3d} min  {task.file}: {', '.join(task.functions)}")


def grade_folders(args):
    """Print what each folder earned; status 1 if points are missing."""
    rows, missing = [], False
    for folder in args.folders:
        if len(args.folders) > 1:
            print(f"\n{folder}")
        results = {task: grade(task, folder, args.seed) for task in listed([args.task])}
        row = {"folder": str(folder)}
        for task, tests in results.items():
            for test in tests:
                print(f"{'ok   ' if not test['message'] else 'WRONG'} {test['earned']}/{test['points']}  "
                      f"{test['name'].replace('_', ' ')}")
                for line in test["message"].splitlines():
                    print(f"        {line}")
            earned, possible = (sum(test[key] for test in tests) for key in ("earned", "points"))
            row[task], missing = earned, missing or earned < possible
            print(f"{task}    {earned} of {possible} points")
            if earned == possible:
                print(f"      next: the runs in assignments/{task}.md. {next_look(task)}")
        rows.append(row | {"total": sum(value for key, value in row.items() if key != "folder")})
        if args.gradescope:
            write_gradescope(args.gradescope, results)
        if args.junit:
            write_junit(args.junit, results)
    if args.csv:
        with open(args.csv, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    return int(missing)


def next_look(task):
    """What the sheet proposes to do after its runs: the lines from "Then" on, up to an empty one."""
    text = (ROOT / "assignments" / f"{task}.md").read_text(encoding="utf-8")
    return " ".join(("Then " + text.partition("\nThen ")[2].partition("\n\n")[0]).split())


def make_gradescope(names, out):
    """setup.sh, run_autograder and the project, to be zipped and uploaded."""
    if out.exists():
        raise ValueError(f"--out {out}: is there already; expected a new folder")
    copy_project(out / "lpft")
    task = names[0] if len(names) == 1 else "all"
    (out / "setup.sh").write_text(
        "#!/usr/bin/env bash\nset -e\napt-get update && apt-get install -y python3 python3-venv\n"
        "python3 -m venv /autograder/venv\n/autograder/venv/bin/pip install torch --index-url "
        "https://download.pytorch.org/whl/cpu\n/autograder/venv/bin/pip install -r /autograder/source/lpft/"
        "requirements.txt\n")
    (out / "run_autograder").write_text(
        "#!/usr/bin/env bash\ncd /autograder/source/lpft\nmkdir -p /autograder/results\n"
        f"/autograder/venv/bin/python -m assignments grade {task} /autograder/submission --seed 7 "
        "--gradescope /autograder/results/results.json || true\n")
    (out / "run_autograder").chmod(0o755)
    (out / "setup.sh").chmod(0o755)
    print(f"zip -r autograder.zip . in {out}, and upload it as the autograder")


def main(argv=None):
    args = parse_args(argv)
    try:
        if args.command == "list":
            show_tasks()
        elif args.command == "cut":
            cut(listed(args.tasks), args.out)
            tasks = listed(args.tasks)
            print(f"open in {args.out}: {', '.join(tasks)}; begin with assignments/{tasks[0]}.md there")
        elif args.command == "grade":
            if len(args.folders) > 1 and (args.gradescope or args.junit):
                raise ValueError("--gradescope and --junit are of one folder; expected --csv for many")
            for folder in args.folders:
                if not folder.exists():
                    raise ValueError(f"{folder}: no such folder; expected one that holds {files(args.task)}")
                if folder.is_file():  # beside the folders, such as a list of names
                    print(f"{folder}: a file, not graded", file=sys.stderr)
            args.folders = [folder for folder in args.folders if folder.is_dir()]
            return grade_folders(args)
        elif args.command == "gradescope":
            make_gradescope(listed(args.tasks), args.out)
        else:
            from assignments.check import check

            return check(listed(args.tasks))
        return 0
    except (ValueError, OSError) as error:
        print(f"assignments: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nassignments: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
