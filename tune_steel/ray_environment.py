"""Settings of the processes of a run; every room that imports Ray imports this first.

Ray reads its own when it is imported.
"""

import gc
import os
from pathlib import Path

# Imports make 300 000 objects that live for ever, and collections look through them again and
# again: a third of the time that a worker's imports take.
gc.set_threshold(50_000)
# Ray's own tables, loggers and error prints are off, because the progress line and our tables say
# it; its memory monitor aborts a whole search when it kills one worker; a trial may take a minute
# to wind up before its worker is used again.
os.environ.update(
    RAY_AIR_NEW_OUTPUT="0",
    RAY_DEDUP_LOGS="0",
    TUNE_DISABLE_AUTO_CALLBACK_LOGGERS="1",
    TUNE_PRINT_ALL_TRIAL_ERRORS="0",
    TUNE_FUNCTION_THREAD_TIMEOUT_S="60",
    # Tune's snapshots are not used: the study's journal is the source of truth.
    TUNE_GLOBAL_CHECKPOINT_S="1000000000",
    RAY_memory_monitor_refresh_ms="0",
    # Ctrl-C and SIGTERM are ours: Tune would end without a word and with exit code 0.
    TUNE_DISABLE_SIGINT_HANDLER="1",
    RAY_CHDIR_TO_TRIAL_DIR="0",
    RAY_USAGE_STATS_ENABLED="0",
    # Memory that a step gives back is kept for the next one: a fit through autograd spent a fifth
    # of its time on pages that the kernel took away and gave again. What a trial gives back goes.
    # Each trial of a worker is a thread, which would keep an arena of its own: a gigabyte after
    # some twenty trials. Beside every tensor, which is aligned, a scrap is left; kept in lists of
    # their own for small requests, the scraps would keep the tensor's place from being used again
    # for one as large: the largest networks would take 45 MB more. glibc reads these at the start
    # of a process, so they reach the workers and not this one.
    MALLOC_MMAP_THRESHOLD_="1000000000",
    MALLOC_TRIM_THRESHOLD_=str(64 * 2**20),
    MALLOC_ARENA_MAX="1",
    GLIBC_TUNABLES="glibc.malloc.tcache_count=0:glibc.malloc.mxfast=0",
    RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO="0",
)
if (Path.home() / ".ray" / "auth_token").exists():
    # A head that is started where this file exists asks for its token; a driver that is given an
    # address does not send it by itself (Ray 2.60). Who starts a head with RAY_AUTH_MODE=disabled
    # has to say the same here.
    os.environ.setdefault("RAY_AUTH_MODE", "token")
