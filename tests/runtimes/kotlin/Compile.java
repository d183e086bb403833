import java.util.Arrays;
import java.util.List;
import org.jetbrains.kotlin.cli.common.ExitCode;
import org.jetbrains.kotlin.cli.jvm.K2JVMCompiler;

/** Compiles several modules in turn in one process, since starting the compiler takes longer than most of them. */
class Compile {
    /** Arguments: those of kotlinc for each module, with "--" between modules. */
    public static void main(String[] arguments) {
        List<String> left = Arrays.asList(arguments);
        while (!left.isEmpty()) {
            int end = left.contains("--") ? left.indexOf("--") : left.size();
            ExitCode code = new K2JVMCompiler().exec(System.err, left.subList(0, end).toArray(new String[0]));
            if (code != ExitCode.OK) System.exit(code.getCode());
            left = left.subList(Math.min(end + 1, left.size()), left.size());
        }
    }
}
