"""A course cut from the code: eight tasks, each some functions of the project with their bodies removed.

    python -m assignments list
    python -m assignments cut a4 --out mine          a copy of the project in which a4 is open
    python -m assignments grade a4 mine              what is right, what is wrong and why

README.md says in which order to do them, INSTRUCTORS.md how to set them. tasks.py has the list and the knife,
grading.py runs the tests in graders/, graders/variants/ holds right and wrong solutions that `check` tries.
"""
