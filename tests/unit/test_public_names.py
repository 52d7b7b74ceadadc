"""The public names, pinned."""

import steploop as sl

NAMES = """
BuildError CarryError DataError InputError Loop MismatchError OutsideError Report State StateError States Step StepError
SteploopError Stream UnsupportedError length_mask memory nn plan register_operation
scan search seq2seq share unbatched verify view
""".split()


def test_the_public_names_are_these():
    assert sorted(sl.__all__) == sorted(NAMES)
    for name in NAMES:
        assert getattr(sl, name) is not None


def test_every_error_is_a_steploop_error_and_a_builtin_one():
    kinds = {
        sl.StepError: TypeError,
        sl.StateError: ValueError,
        sl.CarryError: TypeError,
        sl.InputError: ValueError,
        sl.UnsupportedError: NotImplementedError,
        sl.MismatchError: AssertionError,
        sl.DataError: ValueError,
        sl.BuildError: RuntimeError,
        sl.OutsideError: IndexError,
    }
    for error, builtin in kinds.items():
        assert issubclass(error, sl.SteploopError) and issubclass(error, builtin)
