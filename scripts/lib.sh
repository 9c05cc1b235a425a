# SPDX-License-Identifier: GPL-2.0
# shellcheck shell=bash
#
# Shared by the scripts: the places of things, the contents of the cache, and the
# reports of a step. Sourced, never run.

# The scripts call each other by name: links and $PWD must not matter.
RKSM_TOP=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
RKSM_CACHE=${RKSM_CACHE:-${HOME:-/root}/.cache/rksm}
[[ $RKSM_CACHE == /* ]] || RKSM_CACHE=$PWD/$RKSM_CACHE
export RKSM_CACHE

# Which kernel: Debian's own, or the one that scripts/setup --debug builds.
# Each has a module of its own, below RKSM_OUT.
RKSM_KERNEL=${RKSM_KERNEL:-stock}
case $RKSM_KERNEL in
stock) RKSM_OUT=$RKSM_TOP/build ;;
debug) RKSM_OUT=$RKSM_TOP/build/debug ;;
*)
	printf '%s: RKSM_KERNEL=%s: it is stock or debug\n' "${0##*/}" "$RKSM_KERNEL" >&2
	exit 1
	;;
esac
export RKSM_KERNEL RKSM_OUT

# The Debian root. Its content depends only on these variables, and their hash is
# part of the directory's name. Raise ROOT_RECIPE when scripts/setup builds it in
# another way.
ROOT_RECIPE=3
ROOT_SUITE=trixie
KERNEL_SUITE=trixie-backports
# shellcheck disable=SC2034 # for scripts/setup
KERNEL_SERIES=7.3
ROOT_PACKAGES=(
	# building the kernel tree and the module
	bc bindgen binutils bison ca-certificates cargo flex gcc kmod
	libc6-dev libelf-dev libssl-dev make pahole perl python3 rust-clippy
	rust-src rustc rustfmt xz-utils zstd cpio
	# booting and being the guest
	busybox-static file iproute2 numactl procps qemu-system-x86
	util-linux-extra virtme-ng
	# checking
	git shellcheck sparse
	# building the kernel's selftests
	libnuma-dev liburing-dev
	# building the debug kernel: CONFIG_KASAN with CONFIG_RUST wants clang
	clang lld llvm
)
TREE_RECIPE=2
# The debug kernel: its configuration is scripts/debug/debug.config.
DEBUG_RECIPE=1

warn() { printf '%s: %s\n' "${0##*/}" "$*" >&2; }
die() { warn "$*"; exit 1; }

hash_of() { printf '%s\n' "$@" | sha256sum | cut -c1-12; }

# True inside the Debian root (scripts/enter) and in the guest.
inside_root() { [[ -e /etc/rksm-root ]]; }

# The kernel version that the caller asked for, or that setup found last.
kernel_version()
{
	if [[ ${KERNEL:-} ]]; then
		printf '%s\n' "$KERNEL"
	elif [[ -r $RKSM_CACHE/kernel-version ]]; then
		head -n 1 "$RKSM_CACHE/kernel-version"
	else
		return 1
	fi
}

# Set the names of everything in the cache that belongs to one kernel version:
# KVER, RKSM_ROOT, RKSM_TREE, RKSM_VMLINUX, RKSM_INITRD, RKSM_DEBUG_TREE.
cache_paths()
{
	local rootkey treekey

	KVER=$1
	rootkey=$(hash_of "$ROOT_RECIPE" "$ROOT_SUITE" "$KERNEL_SUITE" "$KVER" \
		"${ROOT_PACKAGES[@]}")
	treekey=$(hash_of "$TREE_RECIPE" "$rootkey" "$KVER")
	RKSM_ROOT=$RKSM_CACHE/root-$rootkey
	RKSM_INITRD=$RKSM_CACHE/initrd-$(hash_of "$rootkey" \
		"$(sha256sum < "$RKSM_TOP/scripts/vm-initramfs")").cpio
	RKSM_STOCK_TREE=$RKSM_CACHE/tree-$treekey
	RKSM_DEBUG_TREE=$RKSM_CACHE/debug-$(hash_of "$DEBUG_RECIPE" "$rootkey" \
		"$(sha256sum < "$RKSM_TOP/scripts/debug/debug.config")")
	if [[ $RKSM_KERNEL == debug ]]; then
		RKSM_TREE=$RKSM_DEBUG_TREE
		RKSM_VMLINUX=$RKSM_TREE/vmlinux
	elif [[ ${KDIR:-} ]]; then
		RKSM_TREE=$(cd "$KDIR" 2>/dev/null && pwd -P) ||
			die "KDIR=$KDIR is not a directory"
		RKSM_VMLINUX=$RKSM_TREE/vmlinux
		[[ -e $RKSM_VMLINUX ]] || RKSM_VMLINUX=$RKSM_CACHE/vmlinux-$rootkey
	else
		RKSM_TREE=$RKSM_STOCK_TREE
		RKSM_VMLINUX=$RKSM_TREE/vmlinux.stock
	fi
	export KVER RKSM_ROOT RKSM_TREE RKSM_VMLINUX RKSM_INITRD RKSM_DEBUG_TREE
}

# Fail unless everything is set up.
need_setup()
{
	local v

	if inside_root; then
		# scripts/enter has exported the names. The guest does not need
		# them.
		return
	fi
	v=$(kernel_version) || die "nothing is set up yet: run scripts/setup first"
	cache_paths "$v"
	[[ -d $RKSM_ROOT ]] || die "the Debian root for $v is not set up: run scripts/setup first"
	[[ $RKSM_KERNEL == stock || -d $RKSM_DEBUG_TREE ]] ||
		die "the debug kernel is not built: run scripts/setup --debug first"
}

# --- rksm-tools ------------------------------------------------------------

# Link it statically: it runs in the Debian root, in guests and on the host, whose
# C library may be older than the root's. With --target, the flag does not apply to
# build scripts, and the result does not replace that of plain cargo.
TOOLS_TARGET=x86_64-unknown-linux-gnu
RKSM_TOOLS=$RKSM_TOP/build/target/$TOOLS_TARGET/release/rksm-tools

build_tools()
{
	local began

	began=$(date +@%s.%N)
	"$RKSM_TOP/scripts/enter" env RUSTFLAGS="-C target-feature=+crt-static" \
		cargo build --quiet --release --locked --manifest-path "$RKSM_TOP/Cargo.toml" \
		--target "$TOOLS_TARGET" -p rksm-tools || die "building rksm-tools failed"
	touch -d "$began" "$RKSM_TOOLS.built"
}

# Build rksm-tools if it is missing or older than its sources. Do not ask cargo each
# time: another cargo may hold its lock for minutes.
need_tools()
{
	local newer

	if [[ -x $RKSM_TOOLS && -e $RKSM_TOOLS.built ]]; then
		newer=$(cd "$RKSM_TOP" && find Cargo.toml Cargo.lock scripts/tools/Cargo.toml \
			scripts/tools/src src/abi -newer "$RKSM_TOOLS.built" -print -quit)
		[[ $newer ]] || return 0
	fi
	build_tools
}

# Do not run it through cargo: a command that ktap-sum runs may need cargo's lock.
tools() # COMMAND ARGUMENT…
{
	need_tools
	"$RKSM_TOOLS" "$@"
}

# --- stages of the tests -------------------------------------------------

# Forget the results of an earlier run.
stages_begin() # TALLY
{
	mkdir -p "$(dirname "$1")"
	: > "$1"
	: > "$1.begun"
	stages_began=$SECONDS
}

# Run a command that prints results, count them into TALLY (rksm-tools ktap-sum),
# and leave its output in build/log/NAME. Beside other stages (see lanes), print
# the output as a whole when the stage ends.
stage() # TALLY NAME COMMAND…
{
	local log=$RKSM_TOP/build/log/$2

	# Build it here, where a failure ends the script, and before the clock starts.
	need_tools
	mkdir -p "$RKSM_TOP/build/log"
	printf '%s\n' "$2" >> "$1.begun"
	if [[ ${in_lane:-} ]]; then
		printf '# %s begins\n' "$2"
		stage_output "$@" > "$log"
		flock "$RKSM_TOP/build/log" cat "$log"
	else
		stage_output "$@" | tee "$log" || true
	fi
}

stage_output() # TALLY NAME COMMAND…
{
	local began=$SECONDS

	printf '\n# === %s ===\n' "$2"
	tools ktap-sum "$2" "$1" "${@:3}" || true
	printf '# === %s took %d s ===\n' "$2" "$((SECONDS - began))"
}

# Run functions side by side, and fail if one of them does. Most of a stage is one
# guest that waits or runs on one CPU, so two lanes fill a machine with two CPUs.
lanes() # FUNCTION…
{
	local in_lane=1 lane pid pids=() rc=0

	# Build it once for all lanes.
	need_tools
	# A shell lets its background jobs ignore the interrupt.
	trap 'trap - INT TERM; kill -TERM 0' INT TERM
	for lane; do
		"$lane" &
		pids+=($!)
	done
	for pid in "${pids[@]}"; do
		wait "$pid" || rc=1
	done
	trap - INT TERM
	return "$rc"
}

# Print the slowest twenty tests, the sum of each stage, the time since stages_begin
# and the sum of all. Fail if a test has failed.
stages_done() # TALLY
{
	local name

	printf '\n# the slowest tests:\n'
	awk '{ print "build/log/" $1 }' "$1" | (cd "$RKSM_TOP" && xargs grep -H -E '^# .* took [0-9.]+ s$') |
		sed -E 's,^build/log/([^:]*):# (.*) took ([0-9.]+) s$,\3 s \1: \2,' | sort -rn | awk 'NR <= 20 { print "#   " $0 }' || true
	printf '\n'
	awk '{ printf "# %s: %d passed, %d failed, %d skipped\n", $1, $2, $3, $4 }' "$1"
	# A stage whose shell was killed leaves no line in the tally.
	awk 'FILENAME == ARGV[1] { ended[$1] = 1; next } !($1 in ended)' "$1" "$1.begun" > "$1.lost"
	while read -r name; do
		printf 'not ok - stage %s did not end\n' "$name"
		printf '%s 0 1 0\n' "$name" >> "$1"
	done < "$1.lost"
	printf '# all stages took %d s\n' "$((SECONDS - stages_began))"
	tools ktap-sum --total "$1"
}
