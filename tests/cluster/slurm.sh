#!/bin/bash
# A Slurm cluster of two nodes on this machine, for the tests of this folder.
#
#   slurm.sh install          Debian's packages, where they are missing
#   slurm.sh up               start it
#   slurm.sh down             end its jobs and stop what was started
#   slurm.sh run COMMAND...   up, the command, and down whatever happens; the exit code is that of the command
#
# It is Debian's Slurm with accounting and two pretended GPUs a node, started by hand, as root and without systemd.
# Each of its daemons is waited for at most WAIT_SECONDS, and is stopped by its pid file. Where a file of the same name
# in /etc/slurm, or a database of this machine, is not from here, it is left alone, and nothing is started. `down` leaves
# the packages, munge's key, a line of /etc/hosts and the pretended GPUs in /dev.
set -euo pipefail

WAIT_SECONDS=60
MARK="# written by tests/cluster/slurm.sh"
CONFIGURATION=(/etc/slurm/slurm.conf /etc/slurm/gres.conf /etc/slurm/slurmdbd.conf)
STATE=/var/spool/slurm-tests
LOGS=/var/log/slurm
DATABASE=/run/slurm-tests-mariadb # socket, data and pid file of a database of our own
SOCKET=/run/mysqld/mysqld.sock    # where Slurm looks for the database of this machine
PID_FILES=(/run/slurmd-n1.pid /run/slurmd-n2.pid /run/slurmctld.pid /run/slurmdbd.pid $DATABASE/pid /run/munge/munged.pid)

fail() {
    echo "slurm.sh: $*" >&2
    exit 1
}

# wait_for WHAT COMMAND...: until the command succeeds.
wait_for() {
    local what=$1 deadline=$((SECONDS + WAIT_SECONDS))
    shift
    until "$@" >/dev/null 2>&1; do
        [ $SECONDS -lt $deadline ] || fail "$what does not answer within $WAIT_SECONDS seconds; see $LOGS"
        sleep 0.5
    done
}

is_running() { [ -s "$1" ] && kill -0 "$(cat "$1")" 2>/dev/null; }

mariadb_here() { mariadb --socket=$DATABASE/socket "$@"; }

nodes_are_idle() { [ "$(sinfo -N -h -t idle -o %N | sort | xargs)" = "n1 n2" ]; }

install_packages() {
    local packages=(slurm-wlm munge slurmdbd mariadb-server) policy=/usr/sbin/policy-rc.d
    if dpkg -s "${packages[@]}" >/dev/null 2>&1; then return; fi
    [ "$(id -u)" = 0 ] || fail "only root can install ${packages[*]}"
    apt-get update -q
    if [ ! -e $policy ]; then # the packages start nothing: `up` does
        printf '#!/bin/sh\nexit 101\n' >$policy
        chmod 755 $policy
        trap "rm -f $policy" EXIT
    fi
    DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends "${packages[@]}"
}

check_configuration_is_ours() {
    local file
    for file in "${CONFIGURATION[@]}"; do
        [ ! -e "$file" ] || grep -qF "$MARK" "$file" || fail "$file is of a cluster of this machine, which is left alone"
    done
}

socket_is_ours() { [ "$(readlink "$SOCKET")" = $DATABASE/socket ]; }

check_can_start() {
    check_configuration_is_ours
    [ "$(id -u)" = 0 ] || fail "only root can start Slurm's daemons"
    command -v slurmctld slurmdbd munged mariadbd >/dev/null || fail "packages are missing: slurm.sh install"
    [ ! -e $SOCKET ] || socket_is_ours || fail "$SOCKET is of a database of this machine, which is left alone"
    for file in "${PID_FILES[@]}"; do
        if is_running "$file"; then fail "the process of $file runs already; slurm.sh down stops it"; fi
    done
}

write_configuration() {
    install -d /etc/slurm
    # Each node claims two cores and some memory, whatever there is (config_overrides); the two share what there is.
    cat >/etc/slurm/slurm.conf <<EOF
$MARK
ClusterName=onebox
SlurmctldHost=localhost
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=cred_expire=10
StateSaveLocation=$STATE/slurmctld
SlurmdSpoolDir=$STATE/slurmd-%n
SlurmctldPidFile=/run/slurmctld.pid
SlurmdPidFile=/run/slurmd-%n.pid
SlurmctldLogFile=$LOGS/slurmctld.log
SlurmdLogFile=$LOGS/slurmd-%n.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=localhost
MpiDefault=none
ReturnToService=1
KillWait=5
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
NodeName=n1 NodeHostname=localhost NodeAddr=127.0.0.1 Port=17001 CPUs=2 RealMemory=4000 Gres=gpu:2 State=UNKNOWN
NodeName=n2 NodeHostname=localhost NodeAddr=127.0.0.1 Port=17002 CPUs=2 RealMemory=4000 Gres=gpu:2 State=UNKNOWN
PartitionName=main Nodes=n[1-2] Default=YES MaxTime=01:00:00 State=UP
EOF
    printf '%s\n' "$MARK" 'NodeName=n[1-2] Name=gpu File=/dev/fakegpu[0-1]' >/etc/slurm/gres.conf
    cat >/etc/slurm/slurmdbd.conf <<EOF
$MARK
AuthType=auth/munge
DbdHost=localhost
SlurmUser=root
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser=slurm
StoragePass=slurm
StorageLoc=slurm_acct_db
LogFile=$LOGS/slurmdbd.log
PidFile=/run/slurmdbd.pid
EOF
    chmod 600 /etc/slurm/slurmdbd.conf
}

start_database() {
    install -d -o mysql -g mysql $DATABASE
    [ -d $DATABASE/data ] || mariadb-install-db --user=mysql --datadir=$DATABASE/data --skip-test-db >$LOGS/mariadb.out
    setsid mariadbd --no-defaults --user=mysql --datadir=$DATABASE/data --socket=$DATABASE/socket \
        --pid-file=$DATABASE/pid --skip-networking --innodb-buffer-pool-size=64M >>$LOGS/mariadb.out 2>&1 </dev/null &
    wait_for mariadb mariadb-admin --socket=$DATABASE/socket ping
    mariadb_here -e "create database if not exists slurm_acct_db;
        create user if not exists 'slurm'@'localhost' identified by 'slurm';
        grant all on slurm_acct_db.* to 'slurm'@'localhost';"
    install -d /run/mysqld
    socket_is_ours || ln -s $DATABASE/socket $SOCKET
}

up() {
    write_configuration
    rm -rf $STATE # jobs of an earlier start
    install -d $STATE/slurmctld $STATE/slurmd-n1 $STATE/slurmd-n2 $LOGS
    for number in 0 1; do
        [ -e /dev/fakegpu$number ] || mknod /dev/fakegpu$number c 1 3 # as the null device
    done
    grep -q ' n1 n2' /etc/hosts || echo '127.0.0.1 n1 n2' >>/etc/hosts
    install -d -o munge -g munge -m 0755 /run/munge
    runuser -u munge -- /usr/sbin/munged
    wait_for munge sh -c 'munge -n | unmunge'
    start_database
    slurmdbd
    wait_for slurmdbd sacctmgr -n list cluster
    sacctmgr -i add cluster onebox >/dev/null || true # it is there already
    slurmctld
    wait_for slurmctld scontrol ping
    slurmd -N n1
    slurmd -N n2
    wait_for "one of the nodes" nodes_are_idle
    sinfo -N
}

# stop PID_FILE: SIGTERM, and SIGKILL if that is not enough.
stop() {
    is_running "$1" || return 0
    local pid deadline=$((SECONDS + 20))
    pid=$(cat "$1")
    kill "$pid" 2>/dev/null || return 0
    while kill -0 "$pid" 2>/dev/null; do
        if [ $SECONDS -ge $deadline ]; then kill -9 "$pid" 2>/dev/null || true; fi
        sleep 0.2
    done
}

down() {
    check_configuration_is_ours
    [ -e /etc/slurm/slurm.conf ] || return 0 # nothing was started from here: munged may be of this machine
    if is_running /run/slurmctld.pid; then
        timeout 20 scancel --user="$(id -un)" || true
        timeout 20 scancel --signal=KILL --user="$(id -un)" || true
        local deadline=$((SECONDS + 20))
        while [ -n "$(timeout 5 squeue -h 2>/dev/null)" ] && [ $SECONDS -lt $deadline ]; do sleep 0.5; done
    fi
    for file in "${PID_FILES[@]}"; do stop "$file"; done
    if socket_is_ours; then rm $SOCKET; fi
    rm -rf $DATABASE $STATE
    rm -f "${CONFIGURATION[@]}" # without them Slurm's commands do not look for a controller for seconds
}

case "${1:-}" in
install) install_packages ;;
up)
    check_can_start
    up
    ;;
down) down ;;
run)
    check_can_start # before `down` may stop anything
    trap down EXIT
    up
    "${@:2}"
    ;;
*) fail "usage: slurm.sh install|up|down|run COMMAND..." ;;
esac
